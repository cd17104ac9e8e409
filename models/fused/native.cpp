// The fused tail's passes over (N, C, H, W) for CPUs, each in one loop; native.py compiles and
// calls them. float32 or bfloat16 elements, float32 for everything small, channels_last (NHWC) or
// contiguous (NCHW) layout.
//
// Work is cut into pieces that one thread does from beginning to end, by shape alone, so that
// results do not depend on the number of threads. Sums are kept in blocks, or rounding would grow
// with the number of pixels.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using std::int64_t;

constexpr int64_t CHANNELS = 1024;  // of a piece in NHWC: whole rows stream best, sums fit the cache
constexpr int64_t BLOCK = 64;      // pixels (NHWC) or groups of LANES (NCHW) that are summed alone
constexpr int64_t LANES = 16;      // sums side by side in NCHW, for the vector units
constexpr int64_t PIECE = 1 << 14; // elements of a piece where nothing is summed

struct bfloat16 {
  std::uint16_t bits;
};

inline float load(const float *p) { return *p; }
inline float load(const bfloat16 *p) {
  std::uint32_t bits = std::uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline void store(float *p, float x) { *p = x; }
inline void store(bfloat16 *p, float x) {  // to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = std::uint16_t(x != x ? 0x7fc0 : rounded);
}

// d: the gradient where the activation let its input through. As in PyTorch NaN lets through.
template <bool MASKED, typename T> inline float masked(const T *grad, const T *out, int64_t i) {
  float d = load(grad + i);
  return MASKED && load(out + i) <= 0 ? 0.f : d;
}

// Two sums per (sample, channel) over the pixels of f(index, channel) → (a, b). `f` may write.
template <typename F>
void sums_nhwc(int64_t n, int64_t c, int64_t pixels, float *sum_a, float *sum_b, const F &f) {
  const int64_t blocks = (c + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * CHANNELS, width = std::min(CHANNELS, c - first);
      float total_a[CHANNELS] = {}, total_b[CHANNELS] = {};
      for (int64_t start = 0; start < pixels; start += BLOCK) {
        const int64_t stop = std::min(start + BLOCK, pixels);
        float a[CHANNELS] = {}, b[CHANNELS] = {};
        for (int64_t pixel = start; pixel < stop; pixel++) {
          const int64_t at = (i * pixels + pixel) * c + first;
#pragma GCC ivdep
          for (int64_t j = 0; j < width; j++) {
            float x, y;
            f(i, first + j, at + j, x, y);
            a[j] += x;
            b[j] += y;
          }
        }
        for (int64_t j = 0; j < width; j++) {
          total_a[j] += a[j];
          total_b[j] += b[j];
        }
      }
      for (int64_t j = 0; j < width; j++) {
        sum_a[i * c + first + j] = total_a[j];
        sum_b[i * c + first + j] = total_b[j];
      }
    }
  }
}

template <typename F>
void sums_nchw(int64_t n, int64_t c, int64_t pixels, float *sum_a, float *sum_b, const F &f) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < n * c; row++) {
    const int64_t i = row / c, channel = row % c, base = row * pixels;
    const int64_t whole = pixels / LANES * LANES;
    float total_a = 0, total_b = 0;
    for (int64_t start = 0; start < whole; start += BLOCK * LANES) {
      const int64_t stop = std::min(start + BLOCK * LANES, whole);
      float a[LANES] = {}, b[LANES] = {};
      for (int64_t pixel = start; pixel < stop; pixel += LANES) {
#pragma GCC ivdep
        for (int64_t j = 0; j < LANES; j++) {
          float x, y;
          f(i, channel, base + pixel + j, x, y);
          a[j] += x;
          b[j] += y;
        }
      }
      for (int64_t j = 0; j < LANES; j++) {
        total_a += a[j];
        total_b += b[j];
      }
    }
    for (int64_t pixel = whole; pixel < pixels; pixel++) {
      float x, y;
      f(i, channel, base + pixel, x, y);
      total_a += x;
      total_b += y;
    }
    sum_a[row] = total_a;
    sum_b[row] = total_b;
  }
}

template <typename F>
void sums(bool nhwc, int64_t n, int64_t c, int64_t pixels, float *a, float *b, const F &f) {
  (nhwc ? sums_nhwc<F> : sums_nchw<F>)(n, c, pixels, a, b, f);
}

// f(sample, channel, index) for every element.
template <typename F> void each(bool nhwc, int64_t n, int64_t c, int64_t pixels, const F &f) {
  if (nhwc) {
    const int64_t rows = std::max(int64_t(1), PIECE / c), pieces = (pixels + rows - 1) / rows;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t i = 0; i < n; i++)
      for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t p = piece * rows; p < std::min(pixels, (piece + 1) * rows); p++) {
          const int64_t at = (i * pixels + p) * c;
#pragma GCC ivdep
          for (int64_t j = 0; j < c; j++)
            f(i, j, at + j);
        }
  } else {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n * c; row++) {
      const int64_t i = row / c, channel = row % c;
#pragma GCC ivdep
      for (int64_t p = 0; p < pixels; p++)
        f(i, channel, row * pixels + p);
    }
  }
}

// mean, and the mean of squared deviations, of each (sample, channel). About the first pixel: a
// sample of the values, so that a mean far from zero does not cancel.
template <typename T>
void moments(bool nhwc, int64_t n, int64_t c, int64_t pixels, const T *z, float *mean,
             float *variance) {
  const int64_t per_channel = nhwc ? 1 : pixels, per_sample = c * pixels;
  sums(nhwc, n, c, pixels, mean, variance,
       [=](int64_t i, int64_t channel, int64_t at, float &a, float &b) {
         const float x = load(z + at) - load(z + i * per_sample + channel * per_channel);
         a = x;
         b = x * x;
       });
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < c; j++) {
      const int64_t at = i * c + j;
      const float shift = mean[at] / pixels;
      variance[at] = std::max(0.f, variance[at] / pixels - shift * shift);
      mean[at] = load(z + i * per_sample + j * per_channel) + shift;
    }
}

template <typename T, bool RESIDUAL, bool ACTIVATION>
void scale_and_add(bool nhwc, int64_t n, int64_t c, int64_t pixels, const T *z, const float *scale,
                   const float *shift, int64_t per_sample, const T *residual, T *out) {
  each(nhwc, n, c, pixels, [=](int64_t i, int64_t channel, int64_t at) {
    const int64_t small = i * per_sample + channel;
    float y = load(z + at) * scale[small] + shift[small];
    if (RESIDUAL)
      y += load(residual + at);
    store(out + at, ACTIVATION && y < 0 ? 0.f : y);  // NaN stays
  });
}

template <typename T, bool MASKED, bool KEEP>
void gradient_sums(bool nhwc, int64_t n, int64_t c, int64_t pixels, const T *grad, const T *out,
                   const T *z, const float *mean, T *d, float *sum_d, float *sum_dz) {
  sums(nhwc, n, c, pixels, sum_d, sum_dz,
       [=](int64_t, int64_t channel, int64_t at, float &a, float &b) {
         a = masked<MASKED>(grad, out, at);
         b = a * (load(z + at) - mean[channel]);
         if (KEEP)
           store(d + at, a);
       });
}

template <typename T, bool MASKED, bool ON_Z>
void gradient_input(bool nhwc, int64_t n, int64_t c, int64_t pixels, const T *grad, const T *out,
                    const T *z, const float *on_grad, const float *on_z, const float *constant,
                    int64_t per_sample, T *dz) {
  each(nhwc, n, c, pixels, [=](int64_t i, int64_t channel, int64_t at) {
    const int64_t small = i * per_sample + channel;
    float x = masked<MASKED>(grad, out, at) * on_grad[small] + constant[small];
    if (ON_Z)
      x += load(z + at) * on_z[channel];
    store(dz + at, x);
  });
}

template <typename T> struct Passes {
  static void scale(bool nhwc, int64_t n, int64_t c, int64_t p, const void *z, const float *scale,
                    const float *shift, int64_t per_sample, const void *residual, bool activation,
                    void *out) {
    auto run = residual ? (activation ? scale_and_add<T, true, true> : scale_and_add<T, true, false>)
                        : (activation ? scale_and_add<T, false, true>
                                      : scale_and_add<T, false, false>);
    run(nhwc, n, c, p, (const T *)z, scale, shift, per_sample, (const T *)residual, (T *)out);
  }
  static void sums(bool nhwc, int64_t n, int64_t c, int64_t p, const void *grad, const void *out,
                   const void *z, const float *mean, void *d, float *sum_d, float *sum_dz) {
    auto run = !out ? gradient_sums<T, false, false>
                    : (d ? gradient_sums<T, true, true> : gradient_sums<T, true, false>);
    run(nhwc, n, c, p, (const T *)grad, (const T *)out, (const T *)z, mean, (T *)d, sum_d, sum_dz);
  }
  static void input(bool nhwc, int64_t n, int64_t c, int64_t p, const void *grad, const void *out,
                    const void *z, const float *on_grad, const float *on_z, const float *constant,
                    int64_t per_sample, void *dz) {
    auto run = out ? (on_z ? gradient_input<T, true, true> : gradient_input<T, true, false>)
                   : (on_z ? gradient_input<T, false, true> : gradient_input<T, false, false>);
    run(nhwc, n, c, p, (const T *)grad, (const T *)out, (const T *)z, on_grad, on_z, constant,
        per_sample, (T *)dz);
  }
};

}  // namespace

extern "C" {

void eca_moments(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *z, float *mean,
                 float *variance) {
  if (half)
    moments(nhwc, n, c, p, (const bfloat16 *)z, mean, variance);
  else
    moments(nhwc, n, c, p, (const float *)z, mean, variance);
}

void eca_scale_and_add(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *z,
                       const float *scale, const float *shift, int64_t per_sample,
                       const void *residual, bool activation, void *out) {
  (half ? Passes<bfloat16>::scale : Passes<float>::scale)(nhwc, n, c, p, z, scale, shift,
                                                          per_sample, residual, activation, out);
}

void eca_gradient_sums(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *grad,
                       const void *out, const void *z, const float *mean, void *d, float *sum_d,
                       float *sum_dz) {
  (half ? Passes<bfloat16>::sums : Passes<float>::sums)(nhwc, n, c, p, grad, out, z, mean, d,
                                                        sum_d, sum_dz);
}

void eca_gradient_input(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *grad,
                        const void *out, const void *z, const float *on_grad, const float *on_z,
                        const float *constant, int64_t per_sample, void *dz) {
  (half ? Passes<bfloat16>::input : Passes<float>::input)(nhwc, n, c, p, grad, out, z, on_grad,
                                                          on_z, constant, per_sample, dz);
}

}  // extern "C"
