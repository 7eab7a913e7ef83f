// Linear layers on one token: a row of the weight, as it is stored, times the input in the form that it asks for.
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

inline int32_t dot(const int8_t *w, const int16_t *x, int64_t n) {
    __m256i one = _mm256_setzero_si256(), two = one;
    auto products = [&](int64_t i) {
        __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i)));
        return _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i *)(x + i)));
    };
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(w + i + AHEAD);
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

// 32 codes of 4 bits, first halves of 16 bytes and then second halves, times 32 of 8: eight sums of four.
inline Eight codes_product(const uint8_t *codes, const int8_t *x) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
    __m256i both = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
    __m256i pairs = _mm256_maddubs_epi16(both, _mm256_loadu_si256((const __m256i *)x));  // 2 * 15 * 128 at most
    return (Eight)_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#else

inline int32_t dot(const int8_t *w, const int16_t *x, int64_t n) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += int32_t(w[i]) * int32_t(x[i]);
    return sum;
}

inline Eight codes_product(const uint8_t *codes, const int8_t *x) {
    Eight sums{};
    for (int64_t i = 0; i < BLOCK / 2; i++) {
        sums[i / 4] += float((codes[i] & 15) * x[i]);
        sums[i / 4 + 4] += float((codes[i] >> 4) * x[i + BLOCK / 2]);
    }
    return sums;
}

#endif

// A layer's input, in the forms its weights ask for.
struct Input {
    int64_t groups = 0, each = 0;  // of a row; blocks of a group
    const float *x = nullptr;
    std::vector<float> ordered, block_scales, block_shifts, group_sums, steps;
    std::vector<int16_t> wide_codes;
    std::vector<int8_t> codes;
    float scale = 0;

    explicit Input(int64_t columns) : ordered(columns), wide_codes(columns), codes(columns) {
        for (auto *each_block : {&block_scales, &block_shifts, &group_sums, &steps}) each_block->resize(columns / BLOCK + WIDTH);
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

// The scale of each block of a row times the input's, and the sum of these times what MIDDLE adds to the block's product.
template <class Number>
Eight row_steps(const Number *scales, Input &input) {
    const float *blocks = input.block_scales.data(), *shifts = input.block_shifts.data();
    float *steps = input.steps.data();
    Eight shift{};
    if (input.each == 1) {
        // The last eight may read the next row's scales, for blocks whose own scale is 0.
        for (int64_t group = 0; group < input.groups; group += WIDTH) {
            Eight some = load(scales + group) * load(blocks + group);
            shift += some * load(shifts + group);
            store(steps + group, some);
        }
        return shift;
    }
    for (int64_t group = 0, block = 0; group < input.groups; group++)
        for (int64_t last = block + input.each; block < last; block++) {
            steps[block] = float(scales[group]) * blocks[block];
            shift[0] += steps[block] * shifts[block];
        }
    return shift;
}

inline float int4_row(const Linear &layer, Input &input, int64_t row) {
    int64_t blocks = input.groups * input.each;
    const uint8_t *codes = (const uint8_t *)layer.weight + row * blocks * (BLOCK / 2);
    const int8_t *x = input.codes.data();
    const float *steps = input.steps.data();
    Eight one{}, two{};
    if (layer.kind == INT4_MIDDLE)
        two = row_steps((const half *)layer.scales + row * input.groups, input);
    else
        row_steps((const float *)layer.scales + row * input.groups, input);
    auto product = [&](int64_t block) { return codes_product(codes + block * (BLOCK / 2), x + block * BLOCK) * steps[block]; };
    int64_t block = 0;
    for (; block + 2 <= blocks; block += 2) {
        __builtin_prefetch(codes + block * (BLOCK / 2) + AHEAD);
        one += product(block);
        two += product(block + 1);
    }
    if (block < blocks) one += product(block);
    float sum = total(one + two);
    return layer.minima ? sum + dot(layer.minima + row * input.groups, input.group_sums.data(), input.groups) : sum;
}

template <class Number>
float int8_row(const Linear &layer, const Input &input, const Number *x, int64_t row) {
    const int8_t *codes = (const int8_t *)layer.weight + row * layer.columns;
    const float *scales = (const float *)layer.scales + row * input.groups;
    float sum = 0;
    for (int64_t group = 0, at = 0; group < input.groups; group++, at += layer.group)
        sum += scales[group] * float(dot(codes + at, x + at, layer.group));
    return sum;
}

inline float row_product(const Linear &layer, Input &input, int64_t row) {
    int64_t n = layer.columns;
    switch (layer.kind) {
        case FLOAT32: return dot((const float *)layer.weight + row * n, input.x, n);
        case FLOAT16: return dot((const half *)layer.weight + row * n, input.x, n);
        case INT8: return int8_row(layer, input, input.wide_codes.data(), row) * input.scale;
        case INT8_WEIGHT: return int8_row(layer, input, input.x, row);
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

}  // namespace
