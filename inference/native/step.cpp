// One decode step of a Llama-family decoder in one call: what the engine's Python does, without an interpreter between the parts.
//
// inference/native/step.py compiles this file once, for the processor it runs on, and hands over pointers to the engine's own
// tensors: weights, key/value cache, rotary table. All threads run the whole step; rows of a matrix and heads of attention are
// shared out, small things (norms, rotations, rounding of inputs) are done by each thread for itself, which is quicker than
// waiting for another. A barrier stands where one thread needs what another has made: five to a layer.
//
// Loops are written for the compiler's vectorizer; only 4-bit products and 16-bit floats spell out AVX2, with a plain loop
// beside them for other processors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <omp.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define X86_VECTORS 1
#endif

using half = _Float16;

extern "C" {

// What a weight's numbers are. The order is step.py's.
enum Kind : int64_t {
    FLOAT32,      // float [rows][columns]
    FLOAT16,      // half [rows][columns]
    INT8_WEIGHT,  // int8 [rows][columns], scales float [rows][groups]; inputs as they are
    INT8,         // the same; inputs rounded to int8 by the layer's or, where that is 0, the token's own scale
    INT4,         // two codes a byte, scales and minima float [rows][groups]; inputs in int8 by blocks of 32
    INT4_MIDDLE,  // the same, scales half, and the minimum is -8 scales
};

struct Linear {
    int64_t kind, rows, columns, group;
    const void *weight, *scales;
    const float *minima, *bias;
    const int64_t *order;  // input column of each weight column, or null
    double input_scale;
};

struct Layers {  // layers that share an input; their outputs stand side by side
    int64_t count;
    const Linear *parts;
};

struct Block {
    const float *input_norm, *head_norms, *post_norm;  // weights times sqrt(size), as inference/norm.py keeps them
    Layers qkv, o, gate_up, down;
    void *keys, *values;  // [kv_heads][max_tokens][head_dim]
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, max_tokens, half_cache, threads;
    double eps, head_eps;  // sqrt(size * eps), for the same reason
    const Block *blocks;
    const float *norm;
    Layers head;
    float *stream, *wide, *gathered;  // buffers: [hidden], [widest of qkv and intermediate], [heads * head_dim]
};
}

namespace {

constexpr int64_t BLOCK = 32;  // inputs of 4-bit layers that share a scale
constexpr float TINY = 1.17549435e-38f;

struct Range {
    int64_t from, to;
};

Range share(int64_t total, int64_t thread, int64_t threads, int64_t unit = 1) {
    int64_t units = (total + unit - 1) / unit;
    return {std::min(total, units * thread / threads * unit), std::min(total, units * (thread + 1) / threads * unit)};
}

// --- products of one row -------------------------------------------------------------------------------------------------

template <class Number>
float dot(const Number *w, const float *x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += float(w[i]) * x[i];
    return sum;
}

#ifdef X86_VECTORS

float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

int32_t dot(const int8_t *w, const int16_t *x, int64_t n) {
    __m256i one = _mm256_setzero_si256(), two = one;
    auto products = [&](int64_t i) {
        __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i)));
        return _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i *)(x + i)));
    };
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        one = _mm256_add_epi32(one, products(i));
        two = _mm256_add_epi32(two, products(i + 16));
    }
    one = _mm256_add_epi32(one, two);
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(one), _mm256_extracti128_si256(one, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1)));
    for (; i < n; i++) sum += int32_t(w[i]) * x[i];
    return sum;
}

float dot(const half *w, const float *x, int64_t n) {
    __m256 one = _mm256_setzero_ps(), two = one;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        one = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + i))), _mm256_loadu_ps(x + i), one);
        two = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + i + 8))), _mm256_loadu_ps(x + i + 8), two);
    }
    float sum = total(_mm256_add_ps(one, two));
    for (; i < n; i++) sum += float(w[i]) * x[i];
    return sum;
}

// 32 codes of 4 bits, first halves of 16 bytes and then second halves, times 32 of 8: eight sums of four.
__m256 codes_product(const uint8_t *codes, const int8_t *x) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
    both = _mm256_and_si256(both, _mm256_set1_epi8(15));
    __m256i pairs = _mm256_maddubs_epi16(both, _mm256_loadu_si256((const __m256i *)x));  // 2 * 15 * 128 at most
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#else

int32_t dot(const int8_t *w, const int16_t *x, int64_t n) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += int32_t(w[i]) * int32_t(x[i]);
    return sum;
}

int32_t codes_product(const uint8_t *codes, const int8_t *x) {
    int32_t sum = 0;
    for (int64_t i = 0; i < BLOCK / 2; i++) sum += (codes[i] & 15) * x[i] + (codes[i] >> 4) * x[i + BLOCK / 2];
    return sum;
}

float total(float v) { return v; }

#endif

// --- a layer's input, in the forms its weights ask for --------------------------------------------------------------------

struct Input {
    std::vector<float> ordered, block_scales, block_sums;
    std::vector<int16_t> wide_codes;
    std::vector<int8_t> codes;
    float scale = 0;
    const float *x = nullptr;

    explicit Input(int64_t columns) : ordered(columns), block_scales(columns / BLOCK + 1), block_sums(columns / BLOCK + 1),
                                      wide_codes(columns), codes(columns) {}

    void prepare(const Linear &layer, const float *given) {
        int64_t n = layer.columns;
        x = given;
        if (layer.order) {
            for (int64_t i = 0; i < n; i++) ordered[i] = given[layer.order[i]];
            x = ordered.data();
        }
        if (layer.kind == INT8) by_token(layer, n);
        if (layer.kind == INT4 || layer.kind == INT4_MIDDLE) by_block(n);
    }

  private:
    // The semantic of compressed-tensors' int8 (see inference/linear.py): max / 127.5, ties to even, -128 to 127.
    void by_token(const Linear &layer, int64_t n) {
        scale = float(layer.input_scale);
        if (scale == 0) {
            float largest = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < n; i++) largest = std::max(largest, std::fabs(x[i]));
            scale = TINY + largest / 127.5f;
        }
        for (int64_t i = 0; i < n; i++)
            wide_codes[i] = int16_t(std::min(127.0f, std::max(-128.0f, std::nearbyint(x[i] / scale))));
    }

    void by_block(int64_t n) {
        for (int64_t block = 0; block < n / BLOCK; block++) {
            const float *from = x + block * BLOCK;
            int8_t *to = codes.data() + block * BLOCK;
            float largest = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < BLOCK; i++) largest = std::max(largest, std::fabs(from[i]));
            float step = TINY + largest / 127.0f, inverse = 1.0f / step;
            int32_t sum = 0;
            for (int64_t i = 0; i < BLOCK; i++) {
                to[i] = int8_t(std::nearbyint(from[i] * inverse));
                sum += to[i];
            }
            block_scales[block] = step;
            block_sums[block] = step * float(sum);
        }
    }
};

float int4_row(const Linear &layer, const Input &input, int64_t row) {
    int64_t blocks = layer.columns / BLOCK, groups = layer.columns / layer.group, each = layer.group / BLOCK;
    const uint8_t *codes = (const uint8_t *)layer.weight + row * blocks * (BLOCK / 2);
    const int8_t *x = input.codes.data();
    float offset = 0;
#ifdef X86_VECTORS
    __m256 sum = _mm256_setzero_ps();
#else
    float sum = 0;
#endif
    auto add = [&](int64_t block, float scale) {
#ifdef X86_VECTORS
        sum = _mm256_fmadd_ps(codes_product(codes + block * (BLOCK / 2), x + block * BLOCK),
                              _mm256_set1_ps(scale * input.block_scales[block]), sum);
#else
        sum += scale * input.block_scales[block] * float(codes_product(codes + block * (BLOCK / 2), x + block * BLOCK));
#endif
    };
    if (layer.kind == INT4_MIDDLE) {
        const half *scales = (const half *)layer.scales + row * groups;
        for (int64_t group = 0, block = 0; group < groups; group++) {
#ifdef X86_VECTORS
            float scale = _cvtsh_ss(((const uint16_t *)scales)[group]);
#else
            float scale = float(scales[group]);
#endif
            for (int64_t last = block + each; block < last; block++) {
                add(block, scale);
                offset -= 8 * scale * input.block_sums[block];
            }
        }
        return total(sum) + offset;
    }
    const float *scales = (const float *)layer.scales + row * groups, *minima = layer.minima + row * groups;
    for (int64_t group = 0, block = 0; group < groups; group++)
        for (int64_t last = block + each; block < last; block++) {
            add(block, scales[group]);
            offset += minima[group] * input.block_sums[block];
        }
    return total(sum) + offset;
}

template <class Number>
float int8_row(const Linear &layer, const Number *x, int64_t row) {
    int64_t groups = layer.columns / layer.group;
    const int8_t *codes = (const int8_t *)layer.weight + row * layer.columns;
    float sum = 0;
    for (int64_t group = 0, at = 0; group < groups; group++, at += layer.group)
        sum += ((const float *)layer.scales)[row * groups + group] * float(dot(codes + at, x + at, layer.group));
    return sum;
}

float row_product(const Linear &layer, const Input &input, int64_t row) {
    int64_t n = layer.columns;
    switch (layer.kind) {
        case FLOAT32: return dot((const float *)layer.weight + row * n, input.x, n);
        case FLOAT16: return dot((const half *)layer.weight + row * n, input.x, n);
        case INT8: return int8_row(layer, input.wide_codes.data(), row) * input.scale;
        case INT8_WEIGHT: return int8_row(layer, input.x, row);
        default: return int4_row(layer, input, row);
    }
}

// Rows `range` of layers side by side; take(row, value) gets each.
template <class Take>
void rows(const Layers &layers, Input &input, const float *x, Range range, Take take) {
    int64_t at = 0;
    for (int64_t part = 0; part < layers.count; part++) {
        const Linear &layer = layers.parts[part];
        int64_t from = std::max(range.from, at), to = std::min(range.to, at + layer.rows);
        if (from < to) {
            input.prepare(layer, x);
            for (int64_t row = from; row < to; row++)
                take(row, row_product(layer, input, row - at) + (layer.bias ? layer.bias[row - at] : 0.0f));
        }
        at += layer.rows;
    }
}

// --- everything else ------------------------------------------------------------------------------------------------------

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

// One head over positions 0 .. position; the last one's key and value are `key` and `value`, which may not be stored yet.
template <class Number>
void attend(const float *query, const Number *keys, const Number *values, const float *key, const float *value, int64_t position,
            int64_t n, std::vector<float> &scores, float *out) {
    float root = 1.0f / std::sqrt(float(n)), largest = dot(key, query, n) * root;
    scores.resize(position + 1);
    scores[position] = largest;
    for (int64_t t = 0; t < position; t++) {
        scores[t] = dot(keys + t * n, query, n) * root;
        largest = std::max(largest, scores[t]);
    }
    float sum = 0;
    for (float &score : scores) sum += score = std::exp(score - largest);
    for (int64_t i = 0; i < n; i++) out[i] = scores[position] * value[i];
    for (int64_t t = 0; t < position; t++) {
        float weight = scores[t];
        const Number *row = values + t * n;
        for (int64_t i = 0; i < n; i++) out[i] += weight * float(row[i]);
    }
    for (int64_t i = 0; i < n; i++) out[i] /= sum;
}

struct Worker {
    const Model &model;
    int64_t thread, threads;
    std::vector<float> x, heads, spare, scores;
    Input input;

    Worker(const Model &m, int64_t thread, int64_t threads)
        : model(m), thread(thread), threads(threads), x(m.hidden), heads((m.heads + 2 * m.kv_heads) * m.head_dim),
          spare(m.head_dim), input(std::max({m.hidden, m.intermediate, m.heads * m.head_dim})) {}

    template <class Number>
    void attention(const Block &block, const float *cosine, const float *sine, int64_t position) {
        int64_t d = model.head_dim, first_value = model.heads + model.kv_heads;
        std::copy(model.wide, model.wide + heads.size(), heads.begin());
        for (int64_t head = 0; head < first_value; head++) {
            float *at = heads.data() + head * d;
            if (block.head_norms) normalize(at, block.head_norms + head * d, d, model.head_eps, at);
            rotate(at, cosine, sine, d, spare.data());
        }
        for (int64_t i = model.heads * d; i < int64_t(heads.size()); i++) heads[i] = float(Number(heads[i]));
        int64_t shared = model.heads / model.kv_heads, stride = model.max_tokens * d;
        Range mine = share(model.heads, thread, threads);
        for (int64_t head = mine.from; head < mine.to; head++) {
            int64_t kv = head / shared;
            attend((heads.data() + head * d), (const Number *)block.keys + kv * stride, (const Number *)block.values + kv * stride,
                   heads.data() + (model.heads + kv) * d, heads.data() + (first_value + kv) * d, position, d, scores,
                   model.gathered + head * d);
        }
        Range kept = share(model.kv_heads, thread, threads);
        for (int64_t kv = kept.from; kv < kept.to; kv++)
            for (int64_t i = 0; i < d; i++) {
                ((Number *)block.keys)[kv * stride + position * d + i] = Number(heads[(model.heads + kv) * d + i]);
                ((Number *)block.values)[kv * stride + position * d + i] = Number(heads[(first_value + kv) * d + i]);
            }
    }

    void step(const float *cosine, const float *sine, int64_t position, float *logits) {
        int64_t hidden = model.hidden, middle = model.intermediate;
        auto add = [&](int64_t row, float value) { model.stream[row] += value; };
        Range qkv = share(heads.size(), thread, threads, 8), stream = share(hidden, thread, threads, 8);
        Range gate = share(middle, thread, threads, 8);
        for (int64_t layer = 0; layer < model.layers; layer++) {
            const Block &block = model.blocks[layer];
            normalize(model.stream, block.input_norm, hidden, model.eps, x.data());
            rows(block.qkv, input, x.data(), qkv, [&](int64_t row, float value) { model.wide[row] = value; });
#pragma omp barrier
            if (model.half_cache)
                attention<half>(block, cosine, sine, position);
            else
                attention<float>(block, cosine, sine, position);
#pragma omp barrier
            rows(block.o, input, model.gathered, stream, add);
#pragma omp barrier
            normalize(model.stream, block.post_norm, hidden, model.eps, x.data());
            rows(block.gate_up, input, x.data(), gate,
                 [&](int64_t row, float value) { model.wide[row] = value / (1.0f + std::exp(-value)); });
            rows(block.gate_up, input, x.data(), {middle + gate.from, middle + gate.to},
                 [&](int64_t row, float value) { model.wide[row - middle] *= value; });
#pragma omp barrier
            rows(block.down, input, model.wide, stream, add);
#pragma omp barrier
        }
        normalize(model.stream, model.norm, hidden, model.eps, x.data());
        int64_t vocabulary = 0;
        for (int64_t part = 0; part < model.head.count; part++) vocabulary += model.head.parts[part].rows;
        rows(model.head, input, x.data(), share(vocabulary, thread, threads, 8),
             [&](int64_t row, float value) { logits[row] = value; });
    }
};

}  // namespace

// model.stream holds the token's embedding; logits [vocabulary] are written, and the cache at `position`.
extern "C" void decode_step(const Model *model, const float *cosine, const float *sine, int64_t position, float *logits) {
#pragma omp parallel num_threads(model->threads)
    Worker(*model, omp_get_thread_num(), omp_get_num_threads()).step(cosine, sine, position, logits);
}

// One layer on one token, with one thread: what the tests look at. `out` has layer->rows elements.
extern "C" void multiply(const Linear *layer, const float *x, float *out) {
    Input input(layer->columns);
    rows({1, layer}, input, x, {0, layer->rows}, [&](int64_t row, float value) { out[row] = value; });
}
