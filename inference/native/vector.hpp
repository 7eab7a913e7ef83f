// Eight floats at a time, in the vector types of GCC and Clang, which compile for any processor; AVX2 is spelled out where the
// compiler does not find it: widening to floats, sums across a vector, products of bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define X86_VECTORS 1
#endif

using half = _Float16;

namespace {

constexpr int64_t WIDTH = 8;
constexpr int64_t LINE = 64;     // bytes of memory that are fetched together
constexpr int64_t AHEAD = 1024;  // bytes before a weight is needed; a page's end stops the processor's own prefetching

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));

inline Eight load(const float *from) {
    Eight v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Eight all(float v) { return Eight{v, v, v, v, v, v, v, v}; }

inline void store(float *to, Eight v) { std::memcpy(to, &v, sizeof v); }

#ifdef X86_VECTORS

inline Eight load(const half *from) { return (Eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

inline Eight load(const int8_t *from) {
    return (Eight)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

// Spelled out: whether a compiler makes one instruction of a product and a sum depends on what stands around them.
inline Eight multiply_add(Eight a, Eight b, Eight c) { return (Eight)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

inline float total(Eight v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#else

template <class Number>
Eight load(const Number *from) {
    Eight v;
    for (int64_t i = 0; i < WIDTH; i++) v[i] = float(from[i]);
    return v;
}

inline Eight multiply_add(Eight a, Eight b, Eight c) { return a * b + c; }

inline float total(Eight v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

#endif

// Weights are fetched while those before them are multiplied. A row that is walked over `passes` times, for some of the tokens
// each time, spreads the fetching of what is behind it over all of them.
struct Fetch {
    int64_t pass = 0, passes = 1;

    // Where the fetching of a row of `bytes` goes on, and how much for each of its bytes.
    const char *from(const void *row, int64_t bytes, int64_t ahead = AHEAD) const {
        return (const char *)row + ahead * passes + pass * bytes / passes;
    }
    int64_t step(int64_t bytes) const { return bytes / passes; }
};

// The sums of w[i] * x[t][i] for TOKENS vectors x, each made in the same order whatever TOKENS is. Numbers that have to be
// widened take two sums, or waiting for one would cost more than reading.
template <int TOKENS, class Number>
void dots(const Number *w, const float *const *x, int64_t n, float *out, Fetch fetch = {}) {
    constexpr int SUMS = sizeof(Number) == sizeof(float) ? 1 : 2;
    Eight sums[SUMS][TOKENS] = {};
    int64_t i = 0, step = fetch.step(SUMS * WIDTH * sizeof(Number));
    const char *next = fetch.from(w, n * sizeof(Number));
    for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH, next += step) {
        __builtin_prefetch(next);
        for (int s = 0; s < SUMS; s++) {
            Eight part = load(w + i + s * WIDTH);
            for (int t = 0; t < TOKENS; t++) sums[s][t] = multiply_add(part, load(x[t] + i + s * WIDTH), sums[s][t]);
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        out[t] = total(SUMS == 1 ? sums[0][t] : sums[0][t] + sums[SUMS - 1][t]);
        for (int64_t rest = i; rest < n; rest++) out[t] = std::fma(float(w[rest]), x[t][rest], out[t]);
    }
}

// The same for ROWS rows of floats, which share what is read of x: out[t][row], `stride` floats from token to token.
template <int ROWS, int TOKENS>
void dots(const float *w, const float *const *x, int64_t n, float *out, int64_t stride, Fetch fetch) {
    Eight sums[ROWS][TOKENS] = {};
    int64_t i = 0, step = fetch.step(ROWS * WIDTH * sizeof(float)), bytes = ROWS * n * sizeof(float);
    const char *next = (const char *)w + bytes + fetch.pass * bytes / fetch.passes;  // of the rows behind these
    for (; i + WIDTH <= n; i += WIDTH, next += step) {
        for (int64_t at = 0; at < step; at += LINE) __builtin_prefetch(next + at);
        Eight parts[ROWS];
        for (int row = 0; row < ROWS; row++) parts[row] = load(w + row * n + i);
        for (int t = 0; t < TOKENS; t++) {
            Eight input = load(x[t] + i);
            for (int row = 0; row < ROWS; row++) sums[row][t] = multiply_add(parts[row], input, sums[row][t]);
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int row = 0; row < ROWS; row++) {
            float &to = out[t * stride + row] = total(sums[row][t]);
            for (int64_t rest = i; rest < n; rest++) to = std::fma(w[row * n + rest], x[t][rest], to);
        }
}

inline float dot(const float *w, const float *x, int64_t n) {
    float sum;
    dots<1>(w, &x, n, &sum);
    return sum;
}

// e^x to 2e-7 of itself; x is taken for -87 or 88 where it is beyond. The polynomial is that of Cephes' expf.
inline Eight exponential(Eight x) {
    x = x < -87.0f ? Eight{} - 87.0f : x;
    x = x > 88.0f ? Eight{} + 88.0f : x;
    Eight shifted = x * 1.44269504088896f + 12582912.0f;  // 1.5 * 2^23, which leaves the integer in the low bits
    Eight n = shifted - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Eight p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    EightInts bits = ((EightInts)shifted << 23) + (127 << 23);
    return (p * r * r + r + 1.0f) * (Eight)bits;
}

}  // namespace
