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

// Sums of `count` values weighted by scores ([QUERIES][stride]) into `to` ([QUERIES][n]): the first VECTORS * WIDTH elements.
template <int QUERIES, int VECTORS, class Number>
void weigh(const Number *values, int64_t count, int64_t n, const float *scores, int64_t stride, float *to) {
    Eight sums[QUERIES][VECTORS];
    for (auto &of_query : sums)
        for (Eight &sum : of_query) sum = Eight{};
    for (int64_t t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++) {
            Eight part = load(values + t * n + v * WIDTH);
            for (int q = 0; q < QUERIES; q++) sums[q][v] = multiply_add(part, all(scores[q * stride + t]), sums[q][v]);
        }
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VECTORS; v++) store(to + q * n + v * WIDTH, sums[q][v]);
}

// Scores of POSITIONS keys for QUERIES queries into scores ([QUERIES][stride]).
template <int QUERIES, int POSITIONS, class Number>
void score(const float *queries, const Number *keys, int64_t n, float *scores, int64_t stride) {
    Eight sums[QUERIES][POSITIONS];
    for (auto &of_query : sums)
        for (Eight &sum : of_query) sum = Eight{};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        Eight parts[POSITIONS];
        for (int p = 0; p < POSITIONS; p++) parts[p] = load(keys + p * n + i);
        for (int q = 0; q < QUERIES; q++) {
            Eight query = load(queries + q * n + i);
            for (int p = 0; p < POSITIONS; p++) sums[q][p] = multiply_add(parts[p], query, sums[q][p]);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 2
        for (int p = 0; p < POSITIONS; p++) {
            float sum = total(sums[q][p]);
            for (int64_t rest = i; rest < n; rest++) sum = std::fma(float(keys[p * n + rest]), queries[q * n + rest], sum);
            scores[q * stride + p] = sum;
        }
}

// Scores s to e^(s - largest), that largest, and their sum; `row` has room for whole vectors.
inline void softmax(float *row, int64_t count, float &largest, float &sum) {
    constexpr float LEAST = -std::numeric_limits<float>::infinity();
    int64_t even = count / WIDTH * WIDTH;
    Eight most = Eight{} + LEAST, sums{};
    for (int64_t t = 0; t < even; t += WIDTH) most = load(row + t) > most ? load(row + t) : most;
    largest = LEAST;
    for (int64_t i = 0; i < WIDTH; i++) largest = std::max(largest, most[i]);
    for (int64_t t = even; t < count; t++) largest = std::max(largest, row[t]);
    for (int64_t t = 0; t < count; t += WIDTH) {
        store(row + t, exponential(load(row + t) - largest));
        if (t < even) sums += load(row + t);
    }
    sum = total(sums);
    for (int64_t t = even; t < count; t++) sum += row[t];
}

// QUERIES queries ([QUERIES][n], scaled) over `count` positions of one head.
template <int QUERIES, class Number>
void attend(const float *queries, const Number *keys, const Number *values, int64_t count, int64_t n, std::vector<float> &scores,
            const Partial &out, int64_t head) {
    constexpr int VECTORS = QUERIES == 1 ? 8 : QUERIES < 4 ? 4 : 3;  // as many sums as registers hold
    int64_t stride = (count + WIDTH - 1) / WIDTH * WIDTH, even = n / WIDTH * WIDTH, bytes = n * sizeof(Number);
    scores.resize(QUERIES * stride);
    for (int64_t t = 0; t < count; t += 2) {
        int64_t some = std::min<int64_t>(2, count - t);
        const Number *key = keys + t * n;
        // Values are wanted next: both are on their way, to the second cache, while keys are multiplied.
        for (int64_t at = 0; at < some * bytes; at += LINE) {
            __builtin_prefetch((const char *)key + at + 2 * AHEAD);
            __builtin_prefetch((const char *)(values + t * n) + at, 0, 2);
        }
        if (some == 2) score<QUERIES, 2>(queries, key, n, scores.data() + t, stride);
        if (some == 1) score<QUERIES, 1>(queries, key, n, scores.data() + t, stride);
    }
    for (int q = 0; q < QUERIES; q++) softmax(scores.data() + q * stride, count, out.largest[head + q], out.sums[head + q]);
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
