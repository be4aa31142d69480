// y[row] += scale * (x[row] A^T) B for a few rows per adapter, in one call per layer.
//
// PyTorch needs two to four operators per adapter and layer, which for a small model and sixteen adapters in
// the batch is more time than the arithmetic. Rows of one slot lie together in `rows`; up to four of
// them share each load of a weight. Sums are float32, whatever the weights are.
//
//   y (·, y_stride), x (·, x_stride)      row-major, of type T
//   a (slots, rank_max, slices, in)       of type T
//   b (slots, rank_max, out)              of type T
//   rows, slots, ranks (count)            slots ascending; the rank of the slot's adapter, 0 for rank_max
//   edges (slices + 1)                    where the slices of `out` begin and end
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
// Columns of y at a time, whose sums stay in the first-level cache.
constexpr int64_t TILE = 512;

inline float one(const float* from) { return *from; }
inline float one(const bfloat16* from) {
    const uint32_t wide = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline void put(float* to, float value) { *to = value; }
inline void put(bfloat16* to, float value) {  // to nearest, ties to even; sums of finite weights are no NaN
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    to->bits = uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
}
inline Lanes many(const float* from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline Lanes many(const bfloat16* from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    const Words wide = __builtin_convertvector(half, Words) << 16;
    Lanes value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

struct Shape {
    int64_t y_stride, x_stride, rank_max, slices, in, out;
};

// hidden[n * depth + j] = scale * (row j of A) . xs[n] for J rows of A at once, so that J * N sums are independent.
template <typename T, int J, int N>
inline void shrink(const T* a, const T* const* xs, int64_t in, float scale, float* hidden, int64_t depth) {
    Lanes sums[J][N] = {};
    int64_t c = 0;
    for (; c + LANES <= in; c += LANES) {
        Lanes x[N];
        for (int n = 0; n < N; n++) x[n] = many(xs[n] + c);
        for (int j = 0; j < J; j++) {
            const Lanes weights = many(a + j * in + c);
            for (int n = 0; n < N; n++) sums[j][n] += weights * x[n];
        }
    }
    for (int j = 0; j < J; j++)
        for (int n = 0; n < N; n++) {
            float total = 0;
            for (int lane = 0; lane < LANES; lane++) total += sums[j][n][lane];
            for (int64_t rest = c; rest < in; rest++) total += one(a + j * in + rest) * one(xs[n] + rest);
            hidden[n * depth + j] = total * scale;
        }
}

// One block: N rows of one slot.
template <typename T, int N>
void block(T* y, const T* x, const T* a, const T* b, const int64_t* rows, int64_t rank, float scale,
           const int64_t* edges, const Shape& shape, float* hidden) {
    const T* xs[N];
    for (int n = 0; n < N; n++) xs[n] = x + rows[n] * shape.x_stride;
    const int64_t depth = rank * shape.slices;
    constexpr int J = 2;  // two rows of A at once: more sums in flight, still all in registers
    int64_t j = 0;
    for (; j + J <= depth; j += J) shrink<T, J, N>(a + j * shape.in, xs, shape.in, scale, hidden + j, depth);
    for (; j < depth; j++) shrink<T, 1, N>(a + j * shape.in, xs, shape.in, scale, hidden + j, depth);
    for (int64_t slice = 0; slice < shape.slices; slice++)
        for (int64_t left = edges[slice]; left < edges[slice + 1]; left += TILE) {
            const int64_t width = edges[slice + 1] - left < TILE ? edges[slice + 1] - left : TILE;
            float sums[N][TILE];
            for (int n = 0; n < N; n++) std::memset(sums[n], 0, sizeof(float) * width);
            // A row of B after the other: rows lie a power of two apart and would evict each other.
            for (int64_t k = 0; k < rank; k++) {
                const T* weights = b + k * shape.out + left;
                float h[N];
                for (int n = 0; n < N; n++) h[n] = hidden[n * depth + k * shape.slices + slice];
                int64_t o = 0;
                for (; o + LANES <= width; o += LANES) {
                    const Lanes w = many(weights + o);
                    for (int n = 0; n < N; n++) {
                        Lanes sum = many(&sums[n][o]) + h[n] * w;
                        std::memcpy(&sums[n][o], &sum, sizeof sum);
                    }
                }
                for (; o < width; o++)
                    for (int n = 0; n < N; n++) sums[n][o] += h[n] * one(weights + o);
            }
            for (int n = 0; n < N; n++) {
                T* out = y + rows[n] * shape.y_stride + left;
                for (int64_t o = 0; o < width; o++) put(out + o, one(out + o) + sums[n][o]);
            }
        }
}

template <typename T>
void add(T* y, const T* x, const T* a, const T* b, const int64_t* rows, const int64_t* slots, const int64_t* ranks,
         int64_t count, float scale, const int64_t* edges, const Shape& shape) {
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < count;) {
        starts.push_back(i);
        int64_t end = i + 1;
        while (end < count && end - i < 4 && slots[end] == slots[i]) end++;
        i = end;
    }
    starts.push_back(count);
#pragma omp parallel if (starts.size() > 2)
    {
        std::vector<float> hidden(4 * shape.rank_max * shape.slices);
#pragma omp for schedule(static)
        for (size_t i = 0; i < starts.size() - 1; i++) {
            const int64_t first = starts[i], slot = slots[first];
            const int64_t rank = ranks[first] ? ranks[first] : shape.rank_max;
            const T* slot_a = a + slot * shape.rank_max * shape.slices * shape.in;
            const T* slot_b = b + slot * shape.rank_max * shape.out;
            const auto run = [&](auto rows_in_block) {
                block<T, rows_in_block()>(y, x, slot_a, slot_b, rows + first, rank, scale, edges, shape,
                                          hidden.data());
            };
            switch (starts[i + 1] - first) {
                case 1: run([]() constexpr { return 1; }); break;
                case 2: run([]() constexpr { return 2; }); break;
                case 3: run([]() constexpr { return 3; }); break;
                default: run([]() constexpr { return 4; });
            }
        }
    }
}

}  // namespace

extern "C" void bespoke_lora_f32(float* y, const float* x, const float* a, const float* b, const int64_t* rows,
                                 const int64_t* slots, const int64_t* ranks, int64_t count, float scale,
                                 const int64_t* edges, const Shape* shape) {
    add(y, x, a, b, rows, slots, ranks, count, scale, edges, *shape);
}

extern "C" void bespoke_lora_bf16(bfloat16* y, const bfloat16* x, const bfloat16* a, const bfloat16* b,
                                  const int64_t* rows, const int64_t* slots, const int64_t* ranks, int64_t count,
                                  float scale, const int64_t* edges, const Shape* shape) {
    add(y, x, a, b, rows, slots, ranks, count, scale, edges, *shape);
}
