// Attention of one token: queries that share a key/value head over a range of positions, and ranges put together.
//
// Threads divide positions between them, not heads (flash-decoding's division): a key is read once for all queries that look at
// it, and the shares are even whatever the number of heads.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vector.hpp"

namespace {

// What one thread has found, for each head: a sum of values weighted by e^(score - largest), that largest, the weights' sum.
struct Partial {
    float *values, *largest, *sums;  // [heads][n], [heads], [heads]

    Partial(float *buffer, int64_t thread, int64_t heads, int64_t n)
        : values(buffer + thread * heads * (n + 2)), largest(values + heads * n), sums(largest + heads) {}
};

// Sums of `count` values weighted by scores ([QUERIES][stride]) into `to` ([QUERIES][n]), VECTORS * WIDTH elements from `i` on.
template <int QUERIES, int VECTORS, class Number>
void weigh(const Number *values, int64_t count, int64_t n, const float *scores, int64_t stride, float *to) {
    Eight sums[QUERIES][VECTORS] = {};
    for (int64_t t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++) {
            Eight part = load(values + t * n + v * WIDTH);
            for (int q = 0; q < QUERIES; q++) sums[q][v] += part * scores[q * stride + t];
        }
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VECTORS; v++) store(to + q * n + v * WIDTH, sums[q][v]);
}

// QUERIES queries ([QUERIES][n], scaled) over `count` positions of one head.
template <int QUERIES, class Number>
void attend(const float *queries, const Number *keys, const Number *values, int64_t count, int64_t n, std::vector<float> &scores,
            const Partial &out, int64_t head) {
    constexpr int VECTORS = QUERIES == 1 ? 8 : QUERIES < 4 ? 4 : 3;  // as many sums as registers hold
    int64_t stride = (count + WIDTH - 1) / WIDTH * WIDTH, even = n / WIDTH * WIDTH, bytes = n * sizeof(Number);
    scores.resize(QUERIES * stride);
    float largest[QUERIES];
    std::fill(largest, largest + QUERIES, -std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < count; t++) {
        const Number *key = keys + t * n;
        // Values are wanted next: both are on their way, to the second cache, while keys are multiplied.
        for (int64_t at = 0; at < bytes; at += LINE) {
            __builtin_prefetch((const char *)key + at + 2 * AHEAD);
            __builtin_prefetch((const char *)(values + t * n) + at, 0, 2);
        }
        Eight sums[QUERIES] = {};
        for (int64_t i = 0; i < even; i += WIDTH) {
            Eight part = load(key + i);
            for (int q = 0; q < QUERIES; q++) sums[q] += part * load(queries + q * n + i);
        }
        for (int q = 0; q < QUERIES; q++) {
            float score = total(sums[q]);
            for (int64_t i = even; i < n; i++) score += float(key[i]) * queries[q * n + i];
            scores[q * stride + t] = score;
            largest[q] = std::max(largest[q], score);
        }
    }
    for (int q = 0; q < QUERIES; q++) {
        float *row = scores.data() + q * stride, sum = 0;
        for (int64_t t = 0; t < count; t += WIDTH) store(row + t, exponential(load(row + t) - largest[q]));
        for (int64_t t = 0; t < count; t++) sum += row[t];
        out.largest[head + q] = largest[q];
        out.sums[head + q] = sum;
    }
    float *to = out.values + head * n;
    int64_t i = 0;
    for (; i + VECTORS * WIDTH <= n; i += VECTORS * WIDTH)
        weigh<QUERIES, VECTORS>(values + i, count, n, scores.data(), stride, to + i);
    for (; i < even; i += WIDTH) weigh<QUERIES, 1>(values + i, count, n, scores.data(), stride, to + i);
    for (; i < n; i++)
        for (int q = 0; q < QUERIES; q++) {
            to[q * n + i] = 0;
            for (int64_t t = 0; t < count; t++) to[q * n + i] += float(values[t * n + i]) * scores[q * stride + t];
        }
}

// The same for any number of queries.
template <class Number>
void attend_shared(const float *queries, int64_t shared, const Number *keys, const Number *values, int64_t count, int64_t n,
                   std::vector<float> &scores, const Partial &out, int64_t head) {
    for (int64_t first = 0; first < shared; first += 4) {
        auto some = [&](auto kernel) { kernel(queries + first * n, keys, values, count, n, scores, out, head + first); };
        switch (std::min<int64_t>(4, shared - first)) {
            case 1: some(attend<1, Number>); break;
            case 2: some(attend<2, Number>); break;
            case 3: some(attend<3, Number>); break;
            default: some(attend<4, Number>);
        }
    }
}

// All threads' shares of a head as one: [n].
inline void combine(float *buffer, int64_t threads, int64_t heads, int64_t head, int64_t n, float *out) {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t thread = 0; thread < threads; thread++) largest = std::max(largest, Partial(buffer, thread, heads, n).largest[head]);
    std::fill(out, out + n, 0.0f);
    for (int64_t thread = 0; thread < threads; thread++) {
        Partial part(buffer, thread, heads, n);
        float weight = std::exp(part.largest[head] - largest);
        sum += weight * part.sums[head];
        for (int64_t i = 0; i < n; i++) out[i] += weight * part.values[head * n + i];
    }
    for (int64_t i = 0; i < n; i++) out[i] /= sum;
}

}  // namespace
