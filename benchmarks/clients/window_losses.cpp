// The losses of windows of tokens in llama.cpp, see benchmarks/fit.py.
//
// window_losses MODEL.gguf SEQLEN THREADS reads token ids (int32) from standard input. For each
// window of SEQLEN ids it prints the sum of the negative log-likelihoods, in nats, of all ids but
// the first. Windows share no context, and no id is added. The attention and its cache are in fp32,
// as in benchmarks/clients/llama_cpp.py.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static void print_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
    }
}

static double loss(const float * logits, int32_t vocabulary, llama_token next) {
    const double highest = *std::max_element(logits, logits + vocabulary);
    double sum = 0;
    for (int32_t id = 0; id < vocabulary; ++id) {
        sum += std::exp(logits[id] - highest);
    }
    return std::log(sum) + highest - logits[next];
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        std::fputs("usage: window_losses MODEL.gguf SEQLEN THREADS < ids\n", stderr);
        return 2;
    }
    const int32_t seqlen = std::atoi(argv[2]), threads = std::atoi(argv[3]);
    llama_log_set(print_errors, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    llama_context_params settings = llama_context_default_params();
    settings.n_ctx = settings.n_batch = settings.n_ubatch = seqlen;
    settings.n_threads = settings.n_threads_batch = threads;
    settings.type_k = settings.type_v = GGML_TYPE_F32;
    settings.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, settings);
    if (!context) {
        return 1;
    }
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_batch batch = llama_batch_init(seqlen, 0, 1);
    std::vector<llama_token> window(seqlen);
    while (std::fread(window.data(), sizeof(llama_token), seqlen, stdin) == size_t(seqlen)) {
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = seqlen;
        for (int32_t place = 0; place < seqlen; ++place) {
            batch.token[place] = window[place];
            batch.pos[place] = place;
            batch.n_seq_id[place] = 1;
            batch.seq_id[place][0] = 0;
            batch.logits[place] = true;
        }
        if (llama_decode(context, batch) != 0) {
            std::fputs("llama_decode failed\n", stderr);
            return 1;
        }
        double sum = 0;
        for (int32_t place = 0; place + 1 < seqlen; ++place) {
            sum += loss(llama_get_logits_ith(context, place), vocabulary, window[place + 1]);
        }
        std::printf("%.17g\n", sum);
        std::fflush(stdout);
    }
    return 0;
}
