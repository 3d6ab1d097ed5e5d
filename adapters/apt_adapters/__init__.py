"""The model families that ship with APT, one file each."""

from apt.hookspecs import AdapterSpec, FormatSpec, hookimpl


@hookimpl
def apt_adapters() -> list[AdapterSpec]:
    """The adapters of the families that ship with APT, and one for any other model."""
    return [
        AdapterSpec(
            "llama",
            "LLaMA and models built like it (SmolLM2, Mistral)",
            "apt_adapters.llama:LlamaAdapter",
            model_types=("llama", "mistral"),
            zoo="apt_adapters:zoo/llama",
        ),
        AdapterSpec(
            "opt",
            "OPT, the post-norm 350m included",
            "apt_adapters.opt:OptAdapter",
            model_types=("opt",),
            zoo="apt_adapters:zoo/opt",
        ),
        AdapterSpec(
            "bloom",
            "BLOOM and BLOOMZ",
            "apt_adapters.bloom:BloomAdapter",
            model_types=("bloom",),
            zoo="apt_adapters:zoo/bloom",
        ),
        AdapterSpec(
            "mamba",
            "Mamba and FalconMamba, dt_proj included",
            "apt_adapters.mamba:MambaAdapter",
            model_types=("mamba", "falcon_mamba"),
            zoo="apt_adapters:zoo/mamba",
            doctor="apt_adapters.kernels:mamba",
        ),
        AdapterSpec(
            "mamba2",
            "Mamba2",
            "apt_adapters.mamba:Mamba2Adapter",
            model_types=("mamba2",),
            zoo="apt_adapters:zoo/mamba2",
            doctor="apt_adapters.kernels:mamba2",
        ),
        AdapterSpec(
            "moe",
            "Mixtures of experts built like LLaMA: Qwen2-MoE, Mixtral, OLMoE",
            "apt_adapters.mixtures:MixtureAdapter",
            model_types=("qwen2_moe", "mixtral", "olmoe"),
            zoo="apt_adapters:zoo/moe",
        ),
        AdapterSpec(
            "jamba",
            "Jamba: attention, Mamba and experts in alternating blocks",
            "apt_adapters.hybrid:JambaAdapter",
            model_types=("jamba",),
            example="apt_adapters.examples:jamba",
            doctor="apt_adapters.kernels:jamba",
        ),
        AdapterSpec(
            "falcon-h1",
            "Falcon-H1: attention and Mamba2 in parallel",
            "apt_adapters.hybrid:FalconH1Adapter",
            model_types=("falcon_h1",),
            example="apt_adapters.examples:falcon_h1",
            doctor="apt_adapters.kernels:falcon_h1",
        ),
        AdapterSpec(
            "bert",
            "BERT and encoders built like it: RoBERTa, XLM-RoBERTa, ELECTRA, MiniLM",
            "apt_adapters.bert:BertAdapter",
            model_types=(
                "bert",
                "camembert",
                "data2vec-text",
                "electra",
                "ernie",
                "roberta",
                "xlm-roberta",
            ),
            zoo="apt_adapters:zoo/bert",
        ),
        AdapterSpec(
            "deberta", "DeBERTa", "apt_adapters.deberta:DebertaAdapter", model_types=("deberta",)
        ),
        AdapterSpec(
            "deberta-v2",
            "DeBERTa-v2, DeBERTa-v3, mDeBERTa",
            "apt_adapters.deberta:DebertaV2Adapter",
            model_types=("deberta-v2",),
        ),
        AdapterSpec(
            "distilbert",
            "DistilBERT",
            "apt_adapters.bert:DistilBertAdapter",
            model_types=("distilbert",),
        ),
        AdapterSpec("mpnet", "MPNet", "apt_adapters.bert:MpnetAdapter", model_types=("mpnet",)),
        AdapterSpec(
            "modernbert",
            "ModernBERT",
            "apt_adapters.bert:ModernBertAdapter",
            model_types=("modernbert",),
        ),
        AdapterSpec(
            "t5",
            "T5 and Flan-T5, mT5, UMT5: the encoder and the decoder",
            "apt_adapters.t5:T5Adapter",
            model_types=("mt5", "t5", "umt5"),
            zoo="apt_adapters:zoo/t5",
        ),
        AdapterSpec(
            "bart",
            "BART, mBART, Marian, M2M-100, NLLB and Pegasus: the encoder and the decoder",
            "apt_adapters.bart:BartAdapter",
            model_types=(
                "bart",
                "blenderbot",
                "blenderbot-small",
                "m2m_100",
                "marian",
                "mbart",
                "pegasus",
                "plbart",
            ),
        ),
        AdapterSpec(
            "whisper",
            "Whisper: the encoder of sound and the decoder of text",
            "apt_adapters.bart:BartAdapter",
            model_types=("whisper",),
        ),
        AdapterSpec(
            "vit",
            "ViT and DeiT: encoders of images",
            "apt_adapters.vision:VitAdapter",
            model_types=("deit", "vit"),
        ),
        AdapterSpec(
            "clip",
            "CLIP and SigLIP: the towers for images and for texts",
            "apt_adapters.vision:ClipAdapter",
            model_types=(
                "clip",
                "clip_text_model",
                "clip_vision_model",
                "siglip",
                "siglip_text_model",
                "siglip_vision_model",
            ),
        ),
        AdapterSpec(
            "wav2vec2",
            "wav2vec 2.0, HuBERT, WavLM and Data2VecAudio: encoders of sound",
            "apt_adapters.wav2vec2:Wav2Vec2Adapter",
            model_types=("data2vec-audio", "hubert", "wav2vec2", "wavlm"),
        ),
        AdapterSpec(
            "mamba-ssm",
            "Models of the package mamba_ssm, from Python only",
            "apt_adapters.native_mamba:NativeMambaAdapter",
            model_types=("MambaLMHeadModel",),
            doctor="apt_adapters.kernels:native",
        ),
        AdapterSpec(
            "auto",
            "Any model of transformers, examined by a run; the default adapter",
            "apt_adapters.auto:AutoAdapter",
            default=True,
        ),
    ]


@hookimpl
def apt_formats() -> list[FormatSpec]:
    """The checkpoint format of mamba_ssm."""
    return [
        FormatSpec(
            "mamba-ssm",
            "Checkpoints in the format of mamba_ssm (state-spaces/mamba-130m)",
            "apt_adapters.native_checkpoint:native_checkpoint",
        )
    ]
