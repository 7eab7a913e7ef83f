// Linear layers on a few tokens: a row of the weight, as it is stored and read once, times the inputs in the form that it asks for.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.hpp"

extern "C" {

// What a weight's numbers are. The order is linear.py's.
enum Kind : int64_t {
    FLOAT32,      // float [rows][columns]
    FLOAT16,      // half [rows][columns]
    INT8_WEIGHT,  // int8 [rows][columns], scales float [rows][groups]; inputs as they are
    INT8,         // the same; inputs rounded to int8 by the layer's or, where that is 0, the token's own scale
    INT4,         // two codes a byte, scales and minima float [rows][groups], eight more scales behind them; inputs in int8 by
                  // blocks of 32
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
}

namespace {

constexpr int64_t BLOCK = 32;  // inputs of 4-bit layers that share a scale
constexpr int64_t MIDDLE = 8;
constexpr float TINY = 1.17549435e-38f;

struct Range {
    int64_t from, to;
};

inline Range share(int64_t total, int64_t thread, int64_t threads, int64_t unit = 1) {
    int64_t units = (total + unit - 1) / unit;
    return {std::min(total, units * thread / threads * unit), std::min(total, units * (thread + 1) / threads * unit)};
}

#ifdef X86_VECTORS

inline int32_t total(__m256i v) {
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1)));
}

template <int TOKENS>
void dots(const int8_t *w, const int16_t *const *x, int64_t n, int32_t *out, Fetch fetch) {
    __m256i one[TOKENS] = {}, two[TOKENS] = {};
    auto wide = [&](int64_t i) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i))); };
    auto product = [](__m256i codes, const int16_t *x) {
        return _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i *)x));
    };
    int64_t i = 0, step = fetch.step(32);
    // Bytes are wanted sooner than floats, and leave the larger caches to what is used again: 5 to 7 % of a step.
    const char *next = fetch.from(w, n, 2 * AHEAD);
    for (; i + 32 <= n; i += 32, next += step) {
        __builtin_prefetch(next, 0, 0);
        __m256i first = wide(i), second = wide(i + 16);
        for (int t = 0; t < TOKENS; t++) {
            one[t] = _mm256_add_epi32(one[t], product(first, x[t] + i));
            two[t] = _mm256_add_epi32(two[t], product(second, x[t] + i + 16));
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        out[t] = total(_mm256_add_epi32(one[t], two[t]));
        for (int64_t rest = i; rest < n; rest++) out[t] += int32_t(w[rest]) * x[t][rest];
    }
}

// A block's 32 codes of 4 bits, of which 16 bytes hold the first half below the second.
struct Codes {
    __m256i codes;

    explicit Codes(const uint8_t *packed) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)packed);
        codes = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
    }

    // Times 32 inputs of 8 bits: eight sums of four.
    Eight times(const int8_t *x) const {
        __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_loadu_si256((const __m256i *)x));  // 2 * 15 * 128 at most
        return (Eight)_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

#else

template <int TOKENS>
void dots(const int8_t *w, const int16_t *const *x, int64_t n, int32_t *out, Fetch) {
    for (int t = 0; t < TOKENS; t++) {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += int32_t(w[i]) * int32_t(x[t][i]);
        out[t] = sum;
    }
}

struct Codes {
    const uint8_t *packed;

    explicit Codes(const uint8_t *packed) : packed(packed) {}

    Eight times(const int8_t *x) const {
        Eight sums{};
        for (int64_t i = 0; i < BLOCK / 2; i++) {
            sums[i / 4] += float((packed[i] & 15) * x[i]);
            sums[i / 4 + 4] += float((packed[i] >> 4) * x[i + BLOCK / 2]);
        }
        return sums;
    }
};

#endif

// A layer's input, in the forms its weights ask for.
struct Input {
    int64_t groups = 0, each = 0;  // of a row; blocks of a group
    const float *x = nullptr;
    std::vector<float> ordered, block_scales, block_shifts, group_sums;
    std::vector<int16_t> wide_codes;
    std::vector<int8_t> codes;
    float scale = 0;

    explicit Input(int64_t columns) : ordered(columns), wide_codes(columns), codes(columns) {
        for (auto *each_block : {&block_scales, &block_shifts, &group_sums}) each_block->resize(columns / BLOCK + WIDTH);
    }

    void prepare(const Linear &layer, const float *given) {
        int64_t n = layer.columns;
        groups = n / layer.group;
        x = given;
        if (layer.order) {
            for (int64_t i = 0; i < n; i++) ordered[i] = given[layer.order[i]];
            x = ordered.data();
        }
        if (layer.kind == INT8) by_token(layer, n);
        if (layer.kind == INT4 || layer.kind == INT4_MIDDLE) by_block(layer, n / BLOCK);
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

    void by_block(const Linear &layer, int64_t blocks) {
        each = layer.group / BLOCK;
        for (auto *numbers : {&group_sums, &block_scales, &block_shifts}) std::fill(numbers->begin(), numbers->end(), 0.0f);
        for (int64_t block = 0; block < blocks; block++) {
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
            block_shifts[block] = -MIDDLE * float(sum);
            group_sums[block / each] += step * float(sum);
        }
    }
};

constexpr int64_t STRIPE = 64;  // blocks of a row whose scales are ready at a time

// The scales of blocks first .. last - 1 of a row times the input's, and the sum of these times what MIDDLE adds to the products.
template <class Number>
Eight stripe_steps(const Number *scales, const Input &input, int64_t first, int64_t last, float *steps) {
    const float *blocks = input.block_scales.data(), *shifts = input.block_shifts.data();
    Eight shift{};
    if (input.each == 1) {
        // The last eight may read the next row's scales, for blocks whose own scale is 0.
        for (int64_t block = first; block < last; block += WIDTH) {
            Eight some = load(scales + block) * load(blocks + block);
            shift += some * load(shifts + block);
            store(steps + block - first, some);
        }
        return shift;
    }
    int64_t group = first / input.each, left = input.each - first % input.each;
    for (int64_t block = first; block < last; block++) {
        steps[block - first] = float(scales[group]) * blocks[block];
        shift[0] += steps[block - first] * shifts[block];
        if (--left == 0) group++, left = input.each;
    }
    return shift;
}

// A row times TOKENS inputs.
template <int TOKENS>
void int4_row(const Linear &layer, const Input *inputs, int64_t row, float *out, Fetch fetch) {
    int64_t groups = inputs[0].groups, blocks = layer.columns / BLOCK;
    const uint8_t *packed = (const uint8_t *)layer.weight + row * blocks * (BLOCK / 2);
    const half *halves = (const half *)layer.scales + row * groups;
    const float *floats = (const float *)layer.scales + row * groups;
    Eight one[TOKENS] = {}, two[TOKENS] = {};
    float steps[TOKENS][STRIPE + WIDTH];
    const char *next = fetch.from(packed, blocks * (BLOCK / 2));
    for (int64_t first = 0; first < blocks; first += STRIPE) {
        int64_t last = std::min(blocks, first + STRIPE), block = first;
        for (int t = 0; t < TOKENS; t++)
            if (layer.kind == INT4_MIDDLE)
                two[t] += stripe_steps(halves, inputs[t], first, last, steps[t]);
            else
                stripe_steps(floats, inputs[t], first, last, steps[t]);
        auto add = [&](int64_t block, Eight *sums) {
            Codes codes(packed + block * (BLOCK / 2));
            for (int t = 0; t < TOKENS; t++)
                sums[t] += codes.times(inputs[t].codes.data() + block * BLOCK) * steps[t][block - first];
        };
        for (; block + 2 <= last; block += 2, next += fetch.step(BLOCK)) {
            __builtin_prefetch(next);
            add(block, one);
            add(block + 1, two);
        }
        if (block < last) add(block, one);
    }
    for (int t = 0; t < TOKENS; t++) {
        out[t] = total(one[t] + two[t]);
        if (layer.minima) out[t] += dot(layer.minima + row * groups, inputs[t].group_sums.data(), groups);
    }
}

// The same; Sum is what a group's products add up in.
template <int TOKENS, class Sum, class Number>
void int8_row(const Linear &layer, const Number *const *x, int64_t groups, int64_t row, float *out, Fetch fetch) {
    const int8_t *codes = (const int8_t *)layer.weight + row * layer.columns;
    const float *scales = (const float *)layer.scales + row * groups;
    std::fill(out, out + TOKENS, 0.0f);
    for (int64_t group = 0, at = 0; group < groups; group++, at += layer.group) {
        const Number *from[TOKENS];
        Sum sums[TOKENS];
        for (int t = 0; t < TOKENS; t++) from[t] = x[t] + at;
        dots<TOKENS>(codes + at, from, layer.group, sums, fetch);
        for (int t = 0; t < TOKENS; t++) out[t] += scales[group] * float(sums[t]);
    }
}

template <int TOKENS>
void row_products(const Linear &layer, const Input *inputs, int64_t row, float *out, Fetch fetch = {}) {
    int64_t n = layer.columns;
    const float *x[TOKENS];
    const int16_t *codes[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        x[t] = inputs[t].x;
        codes[t] = inputs[t].wide_codes.data();
    }
    switch (layer.kind) {
        case FLOAT32: dots<TOKENS>((const float *)layer.weight + row * n, x, n, out, fetch); break;
        case FLOAT16: dots<TOKENS>((const half *)layer.weight + row * n, x, n, out, fetch); break;
        case INT8_WEIGHT: int8_row<TOKENS, float>(layer, x, inputs[0].groups, row, out, fetch); break;
        case INT8:
            int8_row<TOKENS, int32_t>(layer, codes, inputs[0].groups, row, out, fetch);
            for (int t = 0; t < TOKENS; t++) out[t] *= inputs[t].scale;
            break;
        default: int4_row<TOKENS>(layer, inputs, row, out, fetch);
    }
    if (layer.bias)
        for (int t = 0; t < TOKENS; t++) out[t] += layer.bias[row];
}

// Four rows of floats times all tokens, three of these at a time: as many sums as registers hold. out [tokens][rows].
inline void four_rows(const Linear &layer, const Input *inputs, int64_t tokens, int64_t row, float *out) {
    int64_t n = layer.columns;
    const float *w = (const float *)layer.weight + row * n;
    Fetch fetch{0, (tokens + 2) / 3};
    for (int64_t token = 0; token < tokens; token += 3, fetch.pass++) {
        int64_t some = std::min<int64_t>(3, tokens - token);
        const float *x[3];
        for (int64_t t = 0; t < some; t++) x[t] = inputs[token + t].x;
        float *to = out + token * layer.rows + row;
        if (some == 3) dots<4, 3>(w, x, n, to, layer.rows, fetch);
        if (some == 2) dots<4, 2>(w, x, n, to, layer.rows, fetch);
        if (some == 1) dots<4, 1>(w, x, n, to, layer.rows, fetch);
        if (layer.bias)
            for (int64_t t = 0; t < some; t++)
                for (int64_t r = 0; r < 4; r++) to[t * layer.rows + r] += layer.bias[row + r];
    }
}

// What layers side by side make of one token's input; each asks for its own form, which is made when it is first wanted.
struct Inputs {
    const Layers *layers = nullptr;
    const float *x = nullptr;
    int64_t columns;
    std::vector<Input> forms;
    std::vector<char> ready;

    explicit Inputs(int64_t columns) : columns(columns) {}

    void set(const Layers &of, const float *given) {
        layers = &of;
        x = given;
        while (int64_t(forms.size()) < of.count) forms.emplace_back(columns);
        ready.assign(forms.size(), 0);
    }

    // Rows `range`; take(row, value) gets each.
    template <class Take>
    void rows(Range range, Take take) {
        int64_t at = 0;
        for (int64_t part = 0; part < layers->count; part++) {
            const Linear &layer = layers->parts[part];
            int64_t from = std::max(range.from, at), to = std::min(range.to, at + layer.rows);
            if (from < to && !ready[part]) {
                forms[part].prepare(layer, x);
                ready[part] = 1;
            }
            for (int64_t row = from; row < to; row++) {
                float value;
                row_products<1>(layer, &forms[part], row - at, &value);
                take(row, value);
            }
            at += layer.rows;
        }
    }
};

}  // namespace
