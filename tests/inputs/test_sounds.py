import pytest
import torch
from transformers import AutoFeatureExtractor

from apt import AptError, PruneRun
from apt.checkpoints.load import load_tokenizer, open_skeleton
from apt.engine.samples import held_out_samples
from apt.inputs.sounds import SoundReader
from apt.locations.model_source import find
from apt.plugin.registry import registry
from tests.inputs.conftest import write_wave

soundfile = pytest.importorskip("soundfile", reason="the extra speech is not installed")


@pytest.fixture
def waves(model_of):
    return SoundReader(AutoFeatureExtractor.from_pretrained(model_of("wav2vec2")), "input_values")


@pytest.fixture
def features(model_of):
    return SoundReader(AutoFeatureExtractor.from_pretrained(model_of("whisper")), "input_features")


def read(reader, source, count=12, **options):
    return reader.read(str(source), "calibration", count, 0, registry(), **options)


def test_waves_are_cut_to_a_few_lengths(waves, sounds):
    lengths = {len(each["input_values"]) for each in read(waves, sounds)}
    assert lengths == {4096, 5120, 6144, 7168, 8192, 10240}  # of 4800 to 11840 values


def test_a_wave_is_normalised_after_the_cut(waves, sounds):
    for sample in read(waves, sounds):
        assert abs(float(sample["input_values"].mean())) < 1e-4


def test_long_sounds_are_cut(waves, tmp_path):
    write_wave(tmp_path / "long.wav", 20)
    assert len(read(waves, tmp_path, 1)[0]["input_values"]) == 229_376  # 14.3 of 16 seconds


def test_features_of_one_size_are_not_cut(features, sounds):
    samples = read(features, sounds)
    whole = soundfile.read(sounds / "11.wav", dtype="float32")[0]
    expected = features.extractor(whole, sampling_rate=16_000, return_tensors="pt")
    assert {each["input_features"].shape for each in samples} == {torch.Size([8, 100])}
    assert any(torch.equal(s["input_features"], expected["input_features"][0]) for s in samples)


def test_flac(waves, tmp_path):
    write_wave(tmp_path / "plain" / "1.wav")
    values, rate = soundfile.read(tmp_path / "plain" / "1.wav")
    (tmp_path / "packed").mkdir()
    soundfile.write(tmp_path / "packed" / "1.flac", values, rate)
    both = [read(waves, tmp_path / name, 1).digest() for name in ("plain", "packed")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("options", "given"),
    [({"rate": 8000}, "1 channel of 8,000 Hz"), ({"channels": 2}, "2 channels of 16,000 Hz")],
)
def test_other_rates_and_channels(waves, tmp_path, options, given):
    write_wave(tmp_path / "other.wav", **options)
    message = f"other.wav has {given}, and the model takes 1 channel of 16,000 Hz"
    with pytest.raises(AptError, match=message) as error:
        read(waves, tmp_path, 1)
    assert "-ar 16000" in error.value.hint


@pytest.mark.parametrize("content", [b"", b"no sound", b"RIFF" + bytes(40)])
def test_an_unreadable_sound_is_named(waves, tmp_path, content):
    (tmp_path / "broken.wav").write_bytes(content)
    with pytest.raises(AptError, match=r"broken\.wav cannot be read as a sound") as error:
        read(waves, tmp_path, 1)
    assert "\n" not in str(error.value)


def test_a_sound_that_is_too_short(waves, tmp_path):
    write_wave(tmp_path / "short.wav", 0.05)
    with pytest.raises(AptError, match=r"short\.wav has 0.05 seconds of sound"):
        read(waves, tmp_path, 1)


def test_a_folder_of_images_has_no_sounds(waves, images):
    with pytest.raises(AptError, match="has no sounds"):
        read(waves, images)


def test_transcripts_beside_sounds_are_what_the_decoder_reads(apt, model_of, sounds, tmp_path):
    for number in range(12):
        (sounds / f"{number}.txt").write_text(f"this is the sound number {number}", "utf-8")
    model, run = model_of("whisper"), PruneRun(seqlen=2048)
    skeleton = open_skeleton(find(str(model), registry()), registry())
    samples = held_out_samples(str(sounds), run, skeleton, registry(), 12)
    tokenizer = load_tokenizer(skeleton.source)
    assert samples.names == ("input_features", "decoder_input_ids")
    targets = [sample["decoder_input_ids"].tolist() for sample in samples]
    assert {ids[0] for ids in targets} == {1}  # with which the output of this model begins
    written = tokenizer("this is the sound number 1")["input_ids"]
    assert all(len(ids) > 6 and ids[1:6] == written[:5] for ids in targets)
    (sounds / "3.txt").unlink()
    done = apt("prune", model, "--pattern", "2:4", "--calibration", sounds, "--samples", 12,
               "-o", "out")  # fmt: skip
    assert done.code == 2
    assert "some sounds of" in done.err
    assert "have a text, and others have none" in done.err


def test_embedded_sounds_have_their_texts(waves):
    source = registry().calibrations.get("builtin")
    items = {s: list(source.items(source.sounds, s)) for s in ("calibration", "evaluation")}
    assert [len(each) for each in items.values()] == [20, 6]
    texts = [item.text for each in items.values() for item in each]
    assert len(set(texts)) == 26
    assert all(text.endswith(".") for text in texts)
    assert len(read(waves, "builtin", 128)) == 20
