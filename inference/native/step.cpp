// One decode step of a Llama-family decoder in one call: what the engine's Python does, without an interpreter between the parts.
//
// inference/native/step.py compiles this file once, for the processor it runs on, and hands over pointers to the engine's own
// tensors: weights, key/value cache, rotary table. All threads run the whole step; rows of a matrix and positions of attention
// are shared out, small things (norms, rotations, rounding of inputs) are done by each thread for itself, which is quicker than
// waiting for another. A barrier stands where one thread needs what another has made: five to a layer. Memory is not as fast for
// every thread, so one that has done its rows takes some of the others'.

#include <omp.h>

#include <atomic>

#include "attention.hpp"
#include "product.hpp"

extern "C" {

struct Block {
    const float *input_norm, *head_norms, *post_norm;  // weights times sqrt(size), as inference/norm.py keeps them
    Layers qkv, o, gate_up, down;
    void *keys, *values;  // [kv_heads][max_tokens][head_dim]
};

enum Width : int64_t { FLOAT, HALF, BFLOAT };  // of the embedding's numbers

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, max_tokens, half_cache, threads;
    double eps, head_eps;  // sqrt(size * eps), for the same reason
    int64_t width;
    const void *embedding;  // [vocabulary][hidden]
    const Block *blocks;
    const float *norm;
    Layers head;
    float *stream, *wide, *partial;  // buffers: [hidden], [widest of qkv and intermediate], [threads][heads * (head_dim + 2)]
};
}

namespace {

void normalize(const float *x, const float *weight, int64_t n, double eps, float *out) {
    float inverse = float(1.0 / std::hypot(std::sqrt(double(dot(x, x, n))), eps));
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
}

void rotate(float *head, const float *cosine, const float *sine, int64_t n, float *spare) {
    int64_t middle = n / 2;
    for (int64_t i = 0; i < middle; i++) spare[i] = head[i] * cosine[i] + head[i + middle] * sine[i];
    for (int64_t i = middle; i < n; i++) spare[i] = head[i] * cosine[i] + head[i - middle] * sine[i];
    std::copy(spare, spare + n, head);
}

constexpr int64_t PRODUCTS = 4;  // of a block
constexpr int64_t UNIT = 8;      // rows that stay together

// How many of each thread's rows are taken, product by product of a step.
struct Taken {
    struct alignas(LINE) Count {
        std::atomic<int64_t> rows{0};
    };
    int64_t threads;
    std::vector<Count> counts;

    Taken(int64_t products, int64_t threads) : threads(threads), counts(products * threads) {}

    // Calls work(range) for some ranges of `total`: first this thread's own, then those that others have not come to.
    template <class Work>
    void share_out(int64_t product, int64_t thread, int64_t total, Work work) {
        for (int64_t i = 0; i < threads; i++) {
            int64_t owner = (thread + i) % threads;
            Range range = share(total, owner, threads, UNIT);
            auto &taken = counts[product * threads + owner].rows;
            for (;;) {
                // Half of what is left at a time: few turns, and little to wait for at the end.
                int64_t left = range.to - range.from - taken.load(std::memory_order_relaxed);
                int64_t some = std::max(UNIT, left / 2 / UNIT * UNIT);
                int64_t from = range.from + taken.fetch_add(some, std::memory_order_relaxed);
                if (from >= range.to) break;
                work(Range{from, std::min(range.to, from + some)});
            }
        }
    }
};

void look_up(const Model &model, int64_t token) {
    int64_t n = model.hidden, from = token * n;
    auto copy = [&](auto *numbers) { std::copy(numbers + from, numbers + from + n, model.stream); };
    if (model.width == FLOAT) copy((const float *)model.embedding);
    if (model.width == HALF) copy((const half *)model.embedding);
    if (model.width == BFLOAT)
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = uint32_t(((const uint16_t *)model.embedding)[from + i]) << 16;
            std::memcpy(model.stream + i, &bits, sizeof bits);
        }
}

struct Worker {
    const Model &model;
    int64_t thread, threads, product = 0;
    Taken &taken;
    std::vector<float> x, heads, spare, scores, gate, up;
    Inputs inputs;

    Worker(const Model &m, int64_t thread, int64_t threads, Taken &taken)
        : model(m), thread(thread), threads(threads), taken(taken), x(std::max(m.hidden, m.heads * m.head_dim)),
          heads((m.heads + 2 * m.kv_heads) * m.head_dim), spare(m.head_dim), gate(m.intermediate + WIDTH),
          up(m.intermediate + WIDTH), inputs(std::max({m.hidden, m.intermediate, m.heads * m.head_dim})) {}

    // Calls work(range) for some rows of the step's next product, whose input is `from`.
    template <class Work>
    void product_of(const Layers &layers, const float *from, int64_t total, Work work) {
        inputs.set(layers, from);
        taken.share_out(product++, thread, total, work);
    }

    // This thread's positions for all heads. The last thread has the last one and stores what it attends to there.
    template <class Number>
    void attention(const Block &block, const float *cosine, const float *sine, int64_t position) {
        int64_t d = model.head_dim, first_value = model.heads + model.kv_heads, stride = model.max_tokens * d;
        int64_t shared = model.heads / model.kv_heads;
        float root = 1.0f / std::sqrt(float(d));
        std::copy(model.wide, model.wide + heads.size(), heads.begin());
        for (int64_t head = 0; head < first_value; head++) {
            float *at = heads.data() + head * d;
            if (block.head_norms) normalize(at, block.head_norms + head * d, d, model.head_eps, at);
            rotate(at, cosine, sine, d, spare.data());
        }
        for (int64_t i = 0; i < model.heads * d; i++) heads[i] *= root;
        Range mine = share(position + 1, thread, threads);
        Partial found(model.partial, thread, model.heads, d);
        for (int64_t kv = 0; kv < model.kv_heads; kv++) {
            Number *keys = (Number *)block.keys + kv * stride, *values = (Number *)block.values + kv * stride;
            if (thread == threads - 1)
                for (int64_t i = 0; i < d; i++) {
                    keys[position * d + i] = Number(heads[(model.heads + kv) * d + i]);
                    values[position * d + i] = Number(heads[(first_value + kv) * d + i]);
                }
            attend_shared(heads.data() + kv * shared * d, shared, keys + mine.from * d, values + mine.from * d,
                          mine.to - mine.from, d, scores, found, kv * shared);
        }
    }

    // silu(gate) * up of a range of both.
    void feed_forward(Range range) {
        int64_t middle = model.intermediate;
        inputs.rows(range, [&](int64_t row, float value) { gate[row - range.from] = value; });
        inputs.rows({middle + range.from, middle + range.to},
                    [&](int64_t row, float value) { up[row - middle - range.from] = value; });
        for (int64_t i = 0; i < range.to - range.from; i += WIDTH) {
            Eight v = load(gate.data() + i);
            store(gate.data() + i, v / (1.0f + exponential(-v)) * load(up.data() + i));
        }
        std::copy(gate.begin(), gate.begin() + (range.to - range.from), model.wide + range.from);
    }

    void step(const float *cosine, const float *sine, int64_t position, float *logits) {
        int64_t hidden = model.hidden;
        auto put = [&](float *out) {
            return [this, out](Range range) { inputs.rows(range, [=](int64_t row, float value) { out[row] = value; }); };
        };
        auto add = [&](Range range) {
            inputs.rows(range, [&](int64_t row, float value) { model.stream[row] += value; });
        };
        for (int64_t layer = 0; layer < model.layers; layer++) {
            const Block &block = model.blocks[layer];
            normalize(model.stream, block.input_norm, hidden, model.eps, x.data());
            product_of(block.qkv, x.data(), heads.size(), put(model.wide));
#pragma omp barrier
            if (model.half_cache)
                attention<half>(block, cosine, sine, position);
            else
                attention<float>(block, cosine, sine, position);
#pragma omp barrier
            for (int64_t head = 0; head < model.heads; head++)
                combine(model.partial, threads, model.heads, head, model.head_dim, x.data() + head * model.head_dim);
            product_of(block.o, x.data(), hidden, add);
#pragma omp barrier
            normalize(model.stream, block.post_norm, hidden, model.eps, x.data());
            product_of(block.gate_up, x.data(), model.intermediate, [&](Range range) { feed_forward(range); });
#pragma omp barrier
            product_of(block.down, model.wide, hidden, add);
#pragma omp barrier
        }
        normalize(model.stream, model.norm, hidden, model.eps, x.data());
        int64_t vocabulary = 0;
        for (int64_t part = 0; part < model.head.count; part++) vocabulary += model.head.parts[part].rows;
        product_of(model.head, x.data(), vocabulary, put(logits));
    }
};

}  // namespace

// Adds a token: logits [vocabulary] are written, and the cache at `position`.
extern "C" void decode_step(const Model *model, int64_t token, const float *cosine, const float *sine, int64_t position,
                            float *logits) {
    look_up(*model, token);
    Taken taken(PRODUCTS * model->layers + 1, model->threads);
#pragma omp parallel num_threads(model->threads)
    Worker(*model, omp_get_thread_num(), omp_get_num_threads(), taken).step(cosine, sine, position, logits);
}

// One layer on a few tokens: x [tokens][columns], out [tokens][rows]. A token's numbers do not depend on those beside it.
extern "C" void multiply(const Linear *layer, const float *x, int64_t tokens, float *out, int64_t threads) {
    std::vector<Input> inputs(tokens, Input(layer->columns));
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
#pragma omp for
        for (int64_t token = 0; token < tokens; token++) inputs[token].prepare(*layer, x + token * layer->columns);
        Range range = share(layer->rows, thread, count, UNIT);
        int64_t row = range.from;
        if (layer->kind == FLOAT32)
            for (; row + 4 <= range.to; row += 4) four_rows(*layer, inputs.data(), tokens, row, out);
        for (; row < range.to; row++) {
            Fetch fetch{0, (tokens + 3) / 4};
            for (int64_t token = 0; token < tokens; fetch.pass = std::min(fetch.pass + 1, fetch.passes - 1)) {
                const Input *from = &inputs[token];
                int64_t left = tokens - token, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                float values[4];
                if (some == 4) row_products<4>(*layer, from, row, values, fetch);
                if (some == 2) row_products<2>(*layer, from, row, values, fetch);
                if (some == 1) row_products<1>(*layer, from, row, values, fetch);
                for (int64_t t = 0; t < some; t++, token++) out[token * layer->rows + row] = values[t];
            }
        }
    }
}

namespace {

struct Batch {
    int64_t heads, kv_heads, head_dim, count;
    const int64_t *ends;  // [count]
    const float *queries;  // [count][heads][head_dim]
    float *out;            // the same
};

// One query of each sequence over all of its positions. find(sequence, kv head, keys, values) gives the addresses of its keys and
// values, for which it may use the two buffers.
template <class Number, class Find>
void attend_batch(const Batch &batch, int64_t threads, Find find) {
    int64_t n = batch.head_dim, shared = batch.heads / batch.kv_heads, size = shared * n;
    float root = 1.0f / std::sqrt(float(n));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer(shared * (n + 2)), scaled(size), scores;
        std::vector<Number> keys, values;
        Partial found(buffer.data(), 0, shared, n);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < batch.count * batch.kv_heads; unit++) {
            int64_t sequence = unit / batch.kv_heads;
            auto at = find(sequence, unit % batch.kv_heads, keys, values);
            for (int64_t i = 0; i < size; i++) scaled[i] = batch.queries[unit * size + i] * root;
            attend_shared(scaled.data(), shared, at.first, at.second, batch.ends[sequence], n, scores, found, 0);
            for (int64_t i = 0; i < size; i++) batch.out[unit * size + i] = found.values[i] / found.sums[i / n];
        }
    }
}

template <class Number>
void attend_slots(const Batch &batch, int64_t threads, const Number *keys, const Number *values, int64_t max_tokens,
                  const int64_t *slots) {
    attend_batch<Number>(batch, threads, [&](int64_t sequence, int64_t kv, auto &, auto &) {
        int64_t from = (slots[sequence] * batch.kv_heads + kv) * max_tokens * batch.head_dim;
        return std::make_pair(keys + from, values + from);
    });
}

template <class Number>
void attend_pages(const Batch &batch, int64_t threads, const Number *keys, const Number *values, int64_t blocks,
                  int64_t block_size, const int64_t *tables, int64_t width) {
    int64_t each = block_size * batch.head_dim;
    attend_batch<Number>(batch, threads, [&](int64_t sequence, int64_t kv, auto &kept_keys, auto &kept_values) {
        int64_t used = (batch.ends[sequence] + block_size - 1) / block_size;
        kept_keys.resize(used * each);
        kept_values.resize(used * each);
        for (int64_t i = 0; i < used; i++) {
            int64_t from = (kv * blocks + tables[sequence * width + i]) * each;
            std::copy(keys + from, keys + from + each, kept_keys.begin() + i * each);
            std::copy(values + from, values + from + each, kept_values.begin() + i * each);
        }
        return std::make_pair((const Number *)kept_keys.data(), (const Number *)kept_values.data());
    });
}

}  // namespace

// Sequences in the slots of a cache: keys and values [slots][kv_heads][max_tokens][head_dim].
extern "C" void attend_in_slots(const Batch *batch, int64_t threads, int64_t half_cache, const void *keys, const void *values,
                                int64_t max_tokens, const int64_t *slots) {
    if (half_cache)
        attend_slots(*batch, threads, (const half *)keys, (const half *)values, max_tokens, slots);
    else
        attend_slots(*batch, threads, (const float *)keys, (const float *)values, max_tokens, slots);
}

// Sequences in pages: keys and values [kv_heads][blocks][block_size][head_dim], tables [count][width] of block numbers.
extern "C" void attend_in_pages(const Batch *batch, int64_t threads, int64_t half_cache, const void *keys, const void *values,
                                int64_t blocks, int64_t block_size, const int64_t *tables, int64_t width) {
    if (half_cache)
        attend_pages(*batch, threads, (const half *)keys, (const half *)values, blocks, block_size, tables, width);
    else
        attend_pages(*batch, threads, (const float *)keys, (const float *)values, blocks, block_size, tables, width);
}
