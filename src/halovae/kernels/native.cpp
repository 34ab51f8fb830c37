// Memory-bound kernels of Winograd's convolution and of the norms before it, for one CPU. `compiler.py` compiles this
// file with the matrices of `schemes.py` in front; `native.py` documents the functions. Maps have contiguous channels,
// and LANES divides their number.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif
#define INLINE inline __attribute__((always_inline))

using Index = std::ptrdiff_t;
struct Brain { std::uint16_t bits; };  // bfloat16

constexpr int LANES = 16;  // of 32 bits: the widest vectors of any CPU; compilers split them where vectors are narrower
template <class T> using Lanes [[gnu::vector_size(LANES * sizeof(T))]] = T;
typedef Lanes<float> Vector;

template <class T> INLINE Vector load(const T* at) {
  if constexpr (std::is_same_v<T, Brain>) {
    Lanes<std::uint16_t> bits;
    std::memcpy(&bits, at, sizeof bits);
    const Lanes<std::uint32_t> wide = __builtin_convertvector(bits, Lanes<std::uint32_t>) << 16;
    return Vector(wide);
  } else {
    Lanes<T> x;
    std::memcpy(&x, at, sizeof x);
    return __builtin_convertvector(x, Vector);
  }
}

template <class T> INLINE void store(T* at, Vector x) {
  if constexpr (std::is_same_v<T, Brain>) {  // to nearest, ties to even; NaN stays NaN
    const auto wide = Lanes<std::uint32_t>(x);
    Lanes<std::uint32_t> rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    rounded = (wide & 0x7fffffff) > 0x7f800000 ? (wide >> 16) | 0x40 : rounded;
    const auto bits = __builtin_convertvector(rounded, Lanes<std::uint16_t>);
    std::memcpy(at, &bits, sizeof bits);
  } else {
    const auto narrow = __builtin_convertvector(x, Lanes<T>);
    std::memcpy(at, &narrow, sizeof narrow);
  }
}

// Multiply a matrix by a vector. Zeros and ones in the matrix cost nothing.
template <const auto& matrix> INLINE void multiply(const Vector* x, Vector* out) {
  constexpr int ROWS = std::extent_v<std::remove_reference_t<decltype(matrix)>>;
  constexpr int COLS = std::extent_v<std::remove_reference_t<decltype(matrix)>, 1>;
  UNROLLED
  for (int i = 0; i < ROWS; ++i) {
    Vector total{};
    bool any = false;
    UNROLLED
    for (int j = 0; j < COLS; ++j) {
      const float factor = matrix[i][j];
      if (factor == 0) continue;
      const Vector term = factor == 1 ? x[j] : factor * x[j];
      total = any ? total + term : term;
      any = true;
    }
    out[i] = total;
  }
}

// The number of tiles that are transformed along rows before they are transformed along cols. Their intermediate values
// fit in a core's cache, and writes go to few places at a time. One tile at a time, with writes to 36 distant places,
// takes twice as long.
static Index tiles_at_once(Index channels) { return channels < 512 ? 2048 / channels : 4; }

template <class Scheme, class T>
static void transform_inputs(const T* x, Index frame, Index row, Index frames, Index rows, Index cols, Index channels,
                             float* out, int threads) {
  constexpr int PRODUCTS = std::extent_v<decltype(Scheme::input_transform)>;
  constexpr int INPUTS = std::extent_v<decltype(Scheme::input_transform), 1>;
  constexpr Index step = Scheme::step;
  const Index tiles = tiles_at_once(channels), product = frames * rows * cols * channels;
  const Index parts = (cols + tiles - 1) / tiles;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> half(new float[PRODUCTS * (tiles * step + INPUTS) * channels]);
#pragma omp for
    for (Index at = 0; at < frames * rows * parts; ++at) {
      const Index line = at / parts, first = at % parts * tiles;
      const Index count = cols - first < tiles ? cols - first : tiles;
      const Index length = ((count - 1) * step + INPUTS) * channels;
      const T* from = x + line / rows * frame + line % rows * step * row + first * step * channels;
      for (Index k = 0; k < length; k += LANES) {
        Vector cells[INPUTS], sums[PRODUCTS];
        UNROLLED
        for (int i = 0; i < INPUTS; ++i) cells[i] = load(from + i * row + k);
        multiply<Scheme::input_transform>(cells, sums);
        UNROLLED
        for (int p = 0; p < PRODUCTS; ++p) store(&half[p * length + k], sums[p]);
      }
      float* to = out + (line * cols + first) * channels;
      for (int p = 0; p < PRODUCTS; ++p)
        for (Index tile = 0; tile < count; ++tile)
          for (Index k = 0; k < channels; k += LANES) {
            Vector cells[INPUTS], sums[PRODUCTS];
            UNROLLED
            for (int j = 0; j < INPUTS; ++j)
              cells[j] = load(&half[p * length + (tile * step + j) * channels + k]);
            multiply<Scheme::input_transform>(cells, sums);
            UNROLLED
            for (int q = 0; q < PRODUCTS; ++q)
              store(to + (q * PRODUCTS + p) * product + tile * channels + k, sums[q]);
          }
    }
  }
}

template <class Scheme, class T>
static void transform_outputs(const float* products, Index frames, Index rows, Index cols, Index channels,
                              const float* bias, T* out, Index frame, Index row, Index col, bool add, int threads) {
  constexpr int RESULTS = std::extent_v<decltype(Scheme::output_transform)>;
  constexpr int PRODUCTS = std::extent_v<decltype(Scheme::output_transform), 1>;
  const Index tiles = tiles_at_once(channels), product = frames * rows * cols * channels;
  const Index parts = (cols + tiles - 1) / tiles;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> half(new float[RESULTS * PRODUCTS * tiles * channels]);
#pragma omp for
    for (Index at = 0; at < frames * rows * parts; ++at) {
      const Index line = at / parts, first = at % parts * tiles;
      const Index count = cols - first < tiles ? cols - first : tiles, length = count * channels;
      const float* from = products + (line * cols + first) * channels;
      for (int q = 0; q < PRODUCTS; ++q)
        for (Index k = 0; k < length; k += LANES) {
          Vector cells[PRODUCTS], sums[RESULTS];
          UNROLLED
          for (int p = 0; p < PRODUCTS; ++p) cells[p] = load(from + (q * PRODUCTS + p) * product + k);
          multiply<Scheme::output_transform>(cells, sums);
          UNROLLED
          for (int i = 0; i < RESULTS; ++i) store(&half[(i * PRODUCTS + q) * length + k], sums[i]);
        }
      T* to = out + line / rows * frame + line % rows * RESULTS * row + first * RESULTS * col;
      for (int i = 0; i < RESULTS; ++i)
        for (Index tile = 0; tile < count; ++tile)
          for (Index k = 0; k < channels; k += LANES) {
            Vector cells[PRODUCTS], sums[RESULTS];
            UNROLLED
            for (int q = 0; q < PRODUCTS; ++q)
              cells[q] = load(&half[(i * PRODUCTS + q) * length + tile * channels + k]);
            multiply<Scheme::output_transform>(cells, sums);
            UNROLLED
            for (int j = 0; j < RESULTS; ++j) {
              T* place = to + i * row + (tile * RESULTS + j) * col + k;
              const Vector sum = sums[j] + load(bias + k);
              store(place, add ? sum + load(place) : sum);
            }
          }
    }
  }
}

// The mean and the variance of each channel over contiguous cells: two passes over each group of cells, which fits in a
// core's cache. Sums over all groups are in double precision.
template <class T>
static void moments(const T* x, Index cells, Index channels, float* variances, float* means, int threads) {
  constexpr Index GROUP = 64;
  const Index parts = (cells + GROUP - 1) / GROUP;
  std::unique_ptr<double[]> sums(new double[threads * 2 * channels]());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index thread = 0; thread < threads; ++thread) {
    double *first = &sums[thread * 2 * channels], *second = first + channels;
    for (Index part = parts * thread / threads; part < parts * (thread + 1) / threads; ++part) {
      const Index count = cells - part * GROUP < GROUP ? cells - part * GROUP : GROUP;
      for (Index k = 0; k < channels; k += LANES) {
        const T* from = x + part * GROUP * channels + k;
        Vector sum{}, squares{};
        for (Index cell = 0; cell < count; ++cell) sum += load(from + cell * channels);
        const Vector mean = sum / float(count);
        for (Index cell = 0; cell < count; ++cell) {
          const Vector deviation = load(from + cell * channels) - mean;
          squares += deviation * deviation;
        }
        for (int lane = 0; lane < LANES; ++lane) {
          const double value = mean[lane];
          first[k + lane] += count * value;
          second[k + lane] += squares[lane] + count * value * value;
        }
      }
    }
  }
  for (Index k = 0; k < channels; ++k) {
    double first = 0, second = 0;
    for (Index thread = 0; thread < threads; ++thread) {
      first += sums[thread * 2 * channels + k];
      second += sums[(thread * 2 + 1) * channels + k];
    }
    const double mean = first / double(cells), variance = second / double(cells) - mean * mean;
    means[k] = float(mean);
    variances[k] = variance < 0 ? 0 : float(variance);
  }
}

// e^x: 2^n times a polynomial for the remainder, at most ln(2) / 2 (Cephes, expf).
INLINE Vector exponential(Vector x) {
  x = x > 88.f ? Vector{} + 88.f : x;
  x = x < -87.f ? Vector{} - 87.f : x;
  const Vector n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // round to nearest by adding 1.5 * 2^23
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const auto power = (__builtin_convertvector(n, Lanes<std::int32_t>) + 127) << 23;
  return y * Vector(power);
}

INLINE Vector activated(Vector x, bool silu) {
  return !silu ? x : x < -88.f ? x * 0.f : x / (1.f + exponential(-x));
}

// Call `step` with the source and the target of each cell.
template <class T, class Step>
static void each_cell(const T* x, Index frame, Index row, Index frames, Index rows, Index cols, Index channels, T* out,
                      Index to_frame, Index to_row, int threads, Step step) {
#pragma omp parallel for num_threads(threads)
  for (Index line = 0; line < frames * rows; ++line) {
    const T* from = x + line / rows * frame + line % rows * row;
    T* to = out + line / rows * to_frame + line % rows * to_row;
    for (Index cell = 0; cell < cols; ++cell) step(from + cell * channels, to + cell * channels);
  }
}

template <class T>
static void scale_and_shift(const T* x, Index frame, Index row, Index frames, Index rows, Index cols, Index channels,
                            const float* factors, const float* terms, bool silu, T* out, Index to_frame, Index to_row,
                            int threads) {
  const auto step = [=](const T* from, T* to) {
    for (Index k = 0; k < channels; k += LANES)
      store(to + k, activated(load(from + k) * load(factors + k) + load(terms + k), silu));
  };
  each_cell(x, frame, row, frames, rows, cols, channels, out, to_frame, to_row, threads, step);
}

template <class T>
static void normalize(const T* x, Index frame, Index row, Index frames, Index rows, Index cols, Index channels,
                      const float* factors, float added, float least, bool silu, T* out, Index to_frame, Index to_row,
                      int threads) {
  const auto step = [=](const T* from, T* to) {
    Vector squares{};
    for (Index k = 0; k < channels; k += LANES) {
      const Vector value = load(from + k);
      squares += value * value;
    }
    float total = added;
    for (int lane = 0; lane < LANES; ++lane) total += squares[lane];
    const float inverse = 1 / __builtin_sqrtf(total > least ? total : total != total ? total : least);
    for (Index k = 0; k < channels; k += LANES)
      store(to + k, activated(load(from + k) * inverse * load(factors + k), silu));
  };
  each_cell(x, frame, row, frames, rows, cols, channels, out, to_frame, to_row, threads, step);
}

#define EXPORTED(NAME, T)                                                                                              \
  extern "C" void input_transform_plain_##NAME(const T* x, Index frame, Index row, Index frames, Index rows,           \
                                               Index cols, Index channels, float* out, int threads) {                  \
    transform_inputs<Plain>(x, frame, row, frames, rows, cols, channels, out, threads);                                \
  }                                                                                                                    \
  extern "C" void input_transform_upsampling_##NAME(const T* x, Index frame, Index row, Index frames, Index rows,      \
                                                    Index cols, Index channels, float* out, int threads) {             \
    transform_inputs<Upsampling>(x, frame, row, frames, rows, cols, channels, out, threads);                           \
  }                                                                                                                    \
  extern "C" void output_transform_plain_##NAME(const float* products, Index frames, Index rows, Index cols,           \
                                                Index channels, const float* bias, T* out, Index frame, Index row,     \
                                                Index col, int add, int threads) {                                     \
    transform_outputs<Plain>(products, frames, rows, cols, channels, bias, out, frame, row, col, add, threads);        \
  }                                                                                                                    \
  extern "C" void output_transform_upsampling_##NAME(const float* products, Index frames, Index rows, Index cols,      \
                                                     Index channels, const float* bias, T* out, Index frame,           \
                                                     Index row, Index col, int add, int threads) {                     \
    transform_outputs<Upsampling>(products, frames, rows, cols, channels, bias, out, frame, row, col, add, threads);   \
  }                                                                                                                    \
  extern "C" void scale_and_shift_##NAME(const T* x, Index frame, Index row, Index frames, Index rows, Index cols,     \
                                         Index channels, const float* factors, const float* terms, int silu, T* out,   \
                                         Index to_frame, Index to_row, int threads) {                                  \
    scale_and_shift(x, frame, row, frames, rows, cols, channels, factors, terms, silu, out, to_frame, to_row,          \
                    threads);                                                                                          \
  }                                                                                                                    \
  extern "C" void moments_##NAME(const T* x, Index cells, Index channels, float* variances, float* means,              \
                                 int threads) {                                                                        \
    moments(x, cells, channels, variances, means, threads);                                                            \
  }                                                                                                                    \
  extern "C" void normalize_##NAME(const T* x, Index frame, Index row, Index frames, Index rows, Index cols,           \
                                   Index channels, const float* factors, float added, float least, int silu, T* out,   \
                                   Index to_frame, Index to_row, int threads) {                                        \
    normalize(x, frame, row, frames, rows, cols, channels, factors, added, least, silu, out, to_frame, to_row,         \
              threads);                                                                                                \
  }

EXPORTED(float32, float)
EXPORTED(bfloat16, Brain)
#ifdef __FLT16_MANT_DIG__
EXPORTED(float16, _Float16)
#endif
