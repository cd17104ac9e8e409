// The fused tail for CPUs: forward and backward, each in two loops over (N, C, H, W) and one over
// (N, C); cpu_passes.py compiles and calls them. float32 or bfloat16 elements, float32 for
// everything small, channels_last (NHWC) or contiguous (NCHW) layout.
//
// Work is cut into pieces that one thread does from beginning to end, by shape alone, so that
// results do not depend on the number of threads. Sums are taken in blocks, or rounding would grow
// with the number of pixels.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using std::int64_t;

constexpr int64_t CHANNELS = 1024; // of a piece in NHWC: whole rows stream best, sums fit the cache
constexpr int64_t NARROW = 128;    // fewer channels than this in NHWC: several pixels make a row
constexpr int64_t BLOCK = 64;      // rows (NHWC) or groups of LANES (NCHW) that are summed alone
constexpr int64_t LANES = 16;      // sums side by side in NCHW, for the vector units
constexpr int64_t PIECE = 1 << 14; // elements of a piece where nothing is summed
constexpr int64_t ALONE = 1 << 14; // elements up to which waking other threads costs more

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
inline void store(bfloat16 *p, float x) { // to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = std::uint16_t(x != x ? 0x7fc0 : rounded);
}

struct Shape {
  bool nhwc;
  int64_t n, c, pixels;
  int64_t size() const { return n * c * pixels; }
  bool shared() const { return size() > ALONE; } // among threads
  // Pixels that NHWC takes as one row. So a row fills the vector units, whatever the channels.
  int64_t pixels_a_row() const {
    return c < NARROW ? std::min(std::max(int64_t(1), 2 * NARROW / c), pixels) : 1;
  }
};

using Row = std::unique_ptr<float[]>;
Row row(int64_t size) { return Row(new float[size]); } // not zeroed

// `times` copies of the row x, one after the other.
const float *repeated(const float *x, int64_t width, int64_t times, float *into) {
  for (int64_t copy = 0; copy < times; copy++)
    std::copy(x, x + width, into + copy * width);
  return into;
}

// d: the gradient where the activation let its input through. As in PyTorch NaN lets through. A
// ceiling that is NaN stands for none.
template <bool MASKED, typename T>
inline float masked(const T *grad, const T *out, int64_t i, float ceiling) {
  const float d = load(grad + i);
  if (!MASKED)
    return d;
  const float y = load(out + i);
  return y <= 0 || y >= ceiling ? 0.f : d;
}

// Two sums per (sample, channel) over the pixels of f(index, about) → (a, b). `centre(sample,
// channel, width, buffer)` gives where the numbers `about` of so many channels are, which may be in
// the buffer. `f` may write.
template <typename C, typename F>
void sums_nhwc(const Shape &s, float *sum_a, float *sum_b, const C &centre, const F &f) {
  const int64_t group = s.pixels_a_row(), blocks = (s.c + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for collapse(2) schedule(static) if (s.shared())
  for (int64_t i = 0; i < s.n; i++) {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * CHANNELS, width = std::min(CHANNELS, s.c - first);
      const int64_t wide = group > 1 ? group * width : width; // a whole row where pixels are joined
      float buffer[CHANNELS], joined[CHANNELS], total_a[CHANNELS], total_b[CHANNELS];
      const float *about = centre(i, first, width, buffer);
      if (group > 1) {
        about = repeated(about, width, group, joined);
      }
      std::fill(total_a, total_a + wide, 0.f);
      std::fill(total_b, total_b + wide, 0.f);
      for (int64_t start = 0; start < s.pixels; start += BLOCK * group) {
        const int64_t stop = std::min(start + BLOCK * group, s.pixels);
        float block_a[CHANNELS], block_b[CHANNELS];
        const bool all = stop - start == s.pixels; // the only block
        float *a = all ? total_a : block_a, *b = all ? total_b : block_b;
        if (!all) {
          std::fill(a, a + wide, 0.f);
          std::fill(b, b + wide, 0.f);
        }
        for (int64_t pixel = start; pixel < stop; pixel += group) {
          const int64_t at = (i * s.pixels + pixel) * s.c + first;
          const int64_t here = std::min(group, stop - pixel) * width;
#pragma GCC ivdep
          for (int64_t j = 0; j < here; j++) {
            float x, y;
            f(at + j, about[j], x, y);
            a[j] += x;
            b[j] += y;
          }
        }
        for (int64_t j = 0; !all && j < wide; j++) {
          total_a[j] += a[j];
          total_b[j] += b[j];
        }
      }
      for (int64_t pixel = 1; pixel < group; pixel++)
        for (int64_t j = 0; j < width; j++) {
          total_a[j] += total_a[pixel * width + j];
          total_b[j] += total_b[pixel * width + j];
        }
      std::copy(total_a, total_a + width, sum_a + i * s.c + first);
      std::copy(total_b, total_b + width, sum_b + i * s.c + first);
    }
  }
}

template <typename C, typename F>
void sums_nchw(const Shape &s, float *sum_a, float *sum_b, const C &centre, const F &f) {
#pragma omp parallel for schedule(static) if (s.shared())
  for (int64_t line = 0; line < s.n * s.c; line++) {
    const int64_t base = line * s.pixels, whole = s.pixels / LANES * LANES;
    float buffer, total_a = 0, total_b = 0;
    const float about = *centre(line / s.c, line % s.c, 1, &buffer);
    for (int64_t start = 0; start < whole; start += BLOCK * LANES) {
      const int64_t stop = std::min(start + BLOCK * LANES, whole);
      float a[LANES] = {}, b[LANES] = {};
      for (int64_t pixel = start; pixel < stop; pixel += LANES) {
#pragma GCC ivdep
        for (int64_t j = 0; j < LANES; j++) {
          float x, y;
          f(base + pixel + j, about, x, y);
          a[j] += x;
          b[j] += y;
        }
      }
      for (int64_t j = 0; j < LANES; j++) {
        total_a += a[j];
        total_b += b[j];
      }
    }
    for (int64_t pixel = whole; pixel < s.pixels; pixel++) {
      float x, y;
      f(base + pixel, about, x, y);
      total_a += x;
      total_b += y;
    }
    sum_a[line] = total_a;
    sum_b[line] = total_b;
  }
}

template <typename C, typename F>
void sums(const Shape &s, float *a, float *b, const C &centre, const F &f) {
  (s.nhwc ? sums_nhwc<C, F> : sums_nchw<C, F>)(s, a, b, centre, f);
}

// Factors of a pass: three numbers per (sample, channel), or per channel where `step` is 0.
struct Factors {
  const float *a, *b;
  int64_t step;
  const float *on_z; // per channel
};

// f(index, a, b, on_z) for every element, with the factors of its sample and channel.
template <typename F> void each(const Shape &s, const Factors &by, const F &f) {
  if (s.nhwc) {
    const int64_t group = s.pixels_a_row(), wide = group * s.c;
    const int64_t rows = std::max(int64_t(1), PIECE / wide) * group;
    const int64_t pieces = (s.pixels + rows - 1) / rows;
#pragma omp parallel for collapse(2) schedule(static) if (s.shared())
    for (int64_t i = 0; i < s.n; i++)
      for (int64_t piece = 0; piece < pieces; piece++) {
        const float *a = by.a + i * by.step, *b = by.b + i * by.step, *on_z = by.on_z;
        float several[3][2 * NARROW];
        if (group > 1) {
          a = repeated(a, s.c, group, several[0]);
          b = repeated(b, s.c, group, several[1]);
          on_z = repeated(on_z, s.c, group, several[2]);
        }
        const int64_t stop = std::min(s.pixels, (piece + 1) * rows);
        for (int64_t pixel = piece * rows; pixel < stop; pixel += group) {
          const int64_t at = (i * s.pixels + pixel) * s.c;
          const int64_t here = std::min(group, stop - pixel) * s.c;
#pragma GCC ivdep
          for (int64_t j = 0; j < here; j++)
            f(at + j, a[j], b[j], on_z[j]);
        }
      }
  } else {
#pragma omp parallel for schedule(static) if (s.shared())
    for (int64_t line = 0; line < s.n * s.c; line++) {
      const int64_t channel = line % s.c, at = line / s.c * by.step + channel;
      const float a = by.a[at], b = by.b[at], on_z = by.on_z[channel];
#pragma GCC ivdep
      for (int64_t p = 0; p < s.pixels; p++)
        f(line * s.pixels + p, a, b, on_z);
    }
  }
}

// mean, and the mean of squared deviations, of each (sample, channel). About the first pixel: a
// sample of the values, so that a mean far from zero does not cancel.
template <typename T> void moments(const Shape &s, const T *z, float *mean, float *variance) {
  const int64_t per_channel = s.nhwc ? 1 : s.pixels, per_sample = s.c * s.pixels;
  const auto first = [=](int64_t i, int64_t j) { return load(z + i * per_sample + j * per_channel); };
  const auto centre = [=](int64_t i, int64_t channel, int64_t width, float *buffer) {
    for (int64_t j = 0; j < width; j++)
      buffer[j] = first(i, channel + j);
    return buffer;
  };
  sums(s, mean, variance, centre, [=](int64_t at, float about, float &a, float &b) {
    const float x = load(z + at) - about;
    a = x;
    b = x * x;
  });
#pragma omp parallel for schedule(static) if (s.n * s.c > ALONE)
  for (int64_t i = 0; i < s.n; i++)
    for (int64_t j = 0; j < s.c; j++) {
      const int64_t at = i * s.c + j;
      const float shift = mean[at] / s.pixels;
      variance[at] = std::max(0.f, variance[at] / s.pixels - shift * shift);
      mean[at] = first(i, j) + shift;
    }
}

template <typename T, bool RESIDUAL, bool ACTIVATION>
void scale_and_add(const Shape &s, const T *z, const Factors &by, const T *residual, float ceiling,
                   T *out) {
  each(s, by, [=](int64_t at, float scale, float shift, float) {
    float y = load(z + at) * scale + shift;
    if (RESIDUAL)
      y += load(residual + at);
    if (ACTIVATION) { // NaN stays, and a ceiling that is NaN stands for none
      y = y < 0 ? 0.f : y;
      y = y > ceiling ? ceiling : y;
    }
    store(out + at, y);
  });
}

template <typename T>
void scale_and_add(const Shape &s, const T *z, const Factors &by, const T *residual,
                   bool activation, float ceiling, T *out) {
  auto run = residual ? (activation ? scale_and_add<T, true, true> : scale_and_add<T, true, false>)
                      : (activation ? scale_and_add<T, false, true>
                                    : scale_and_add<T, false, false>);
  run(s, z, by, residual, ceiling, out);
}

template <typename T, bool MASKED, bool KEEP>
void gradient_sums(const Shape &s, const T *grad, const T *out, float ceiling, const T *z,
                   const float *mean, T *d, float *sum_d, float *sum_dz) {
  sums(s, sum_d, sum_dz, [=](int64_t, int64_t channel, int64_t, float *) { return mean + channel; },
       [=](int64_t at, float about, float &a, float &b) {
         a = masked<MASKED>(grad, out, at, ceiling);
         b = a * (load(z + at) - about);
         if (KEEP)
           store(d + at, a);
       });
}

template <typename T, bool MASKED, bool ON_Z>
void gradient_input(const Shape &s, const T *grad, const T *out, float ceiling, const T *z,
                    const Factors &by, T *dz) {
  each(s, by, [=](int64_t at, float on_grad, float constant, float on_z) {
    float x = masked<MASKED>(grad, out, at, ceiling) * on_grad + constant;
    if (ON_Z)
      x += load(z + at) * on_z;
    store(dz + at, x);
  });
}

// 1 / (1 + exp(-x)) to two units in the last place, in operations that vector units have: exp(-x)
// is 2^whole · exp(rest), |rest| ≤ ln(2)/2. NaN stays.
inline float sigmoid(float x) {
  const float limit = 87.f, negative = -x < -limit ? -limit : (-x > limit ? limit : -x);
  const float whole = std::floor(negative * 1.44269504f + 0.5f);
  const float rest = negative - whole * 0.693359375f + whole * 2.12194440e-4f; // ln 2 in two parts
  float e = 1.9875691500e-4f; // Cephes' polynomial of expf
  e = e * rest + 1.3981999507e-3f;
  e = e * rest + 8.3334519073e-3f;
  e = e * rest + 4.1665795894e-2f;
  e = e * rest + 1.6666665459e-1f;
  e = e * rest + 5.0000001201e-1f;
  e = e * rest * rest + rest + 1.f;
  const std::int32_t bits = (std::int32_t(whole != whole ? 0.f : whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return 1.f / (1.f + e * power);
}

// result[j] = Σ_t kernel[t] · x[j + t - k/2], zeros beyond the ends; with FLIP x[j - t + k/2].
template <bool FLIP>
void along_channels(const float *x, int64_t c, const float *kernel, int64_t k, float *result) {
  std::fill(result, result + c, 0.f);
  for (int64_t t = 0; t < k; t++) {
    const int64_t shift = FLIP ? k / 2 - t : t - k / 2;
    const int64_t first = std::max(int64_t(0), -shift), stop = std::min(c, c - shift);
    for (int64_t j = first; j < stop; j++)
      result[j] += kernel[t] * x[j + shift];
  }
}

// The parameters of a tail, and what its forward pass keeps: mean, 1/σ (C,), pooled, gate (N, C).
struct Tail {
  const float *weight, *bias, *kernel; // kernel: null without ECA
  int64_t k;
  float *mean, *inverse_std, *pooled, *gate;
  Tail(const Shape &s, const float *weight, const float *bias, const float *kernel, int64_t k,
       float *kept)
      : weight(weight), bias(bias), kernel(kernel), k(k), mean(kept), inverse_std(kept + s.c),
        pooled(kept + 2 * s.c), gate(kept + 2 * s.c + s.n * s.c) {}
};

// BatchNorm's statistics: read where the batch's are not taken; else, where they are given, moved
// by the share `momentum` towards the batch's.
struct Running {
  float *mean, *variance;
  float momentum;
};

// Σ over the samples of value(index, channel), in double: (C,).
template <typename F> void over_rows(const Shape &s, const F &value, std::vector<double> &total) {
  std::fill(total.begin(), total.end(), 0.);
  for (int64_t i = 0; i < s.n; i++)
    for (int64_t j = 0; j < s.c; j++)
      total[j] += value(i * s.c + j, j);
}

// Pooled values and gate of one sample (C,), and with them the factors a and b of z · a + b.
void gate_forward(const Shape &s, const Tail &tail, int64_t i, const float *means, float *a,
                  float *b) {
  // Pointers of its own: behind a reference each may have changed after every store.
  const float *weight = tail.weight, *bias = tail.bias, *mean = tail.mean;
  const float *inverse_std = tail.inverse_std;
  float *pooled = tail.pooled + i * s.c, *gate = tail.gate + i * s.c;
#pragma GCC ivdep
  for (int64_t j = 0; j < s.c; j++) {
    pooled[j] = (means[j] - mean[j]) * inverse_std[j];
    a[j] = pooled[j] * weight[j] + bias[j];
  }
  along_channels<false>(a, s.c, tail.kernel, tail.k, gate);
#pragma GCC ivdep
  for (int64_t j = 0; j < s.c; j++) {
    gate[j] = sigmoid(gate[j]);
    const float slope = weight[j] * inverse_std[j];
    b[j] = (bias[j] - mean[j] * slope) * gate[j];
    a[j] = slope * gate[j];
  }
}

template <typename T>
void tail_forward(const Shape &s, const T *z, const Tail &tail, const T *residual, bool batch,
                  const Running &running, float eps, bool activation, float ceiling, T *out) {
  const int64_t nc = s.n * s.c, rows = tail.kernel ? s.n : 1;
  Row means = row(nc), scale = row(std::max(nc, s.c)), shift = row(rows * s.c);
  if (batch || tail.kernel)
    moments(s, z, means.get(), scale.get()); // scale holds the variances until they are used
  if (batch) {
    std::vector<double> total(s.c), squares(s.c);
    over_rows(s, [&](int64_t at, int64_t) { return means[at]; }, total);
    over_rows(s, [&](int64_t at, int64_t j) {
      const double deviation = means[at] - total[j] / s.n;
      return scale[at] + deviation * deviation;
    }, squares);
    const double count = double(s.n) * s.pixels;
    for (int64_t j = 0; j < s.c; j++) {
      tail.mean[j] = total[j] / s.n;
      tail.inverse_std[j] = 1 / std::sqrt(squares[j] / s.n + eps);
      if (running.mean) {
        const float unbiased = squares[j] / s.n * (count / (count - 1));
        running.mean[j] += running.momentum * (tail.mean[j] - running.mean[j]);
        running.variance[j] += running.momentum * (unbiased - running.variance[j]);
      }
    }
  } else {
    for (int64_t j = 0; j < s.c; j++) {
      tail.mean[j] = running.mean[j]; // a copy: a step of training may come before backward
      tail.inverse_std[j] = 1 / std::sqrt(running.variance[j] + eps);
    }
  }
  if (!tail.kernel) {
    for (int64_t j = 0; j < s.c; j++) {
      scale[j] = tail.weight[j] * tail.inverse_std[j];
      shift[j] = tail.bias[j] - tail.mean[j] * scale[j];
    }
  } else {
#pragma omp parallel for schedule(static) if (nc > ALONE)
    for (int64_t i = 0; i < s.n; i++)
      gate_forward(s, tail, i, means.get() + i * s.c, scale.get() + i * s.c, shift.get() + i * s.c);
  }
  const Factors by{scale.get(), shift.get(), tail.kernel ? s.c : 0, scale.get()};
  scale_and_add(s, z, by, residual, activation, ceiling, out);
}

// Σ∂y and Σ∂y·x̂ of y = BN(z) for one sample, in the place of Σd and Σd·x̂, and ∂pooled (C,); its
// part of ∂kernel (k,).
void gate_backward(const Shape &s, const Tail &tail, int64_t i, float *sum_d, float *sum_dx,
                   float *d_pooled, double *d_kernel) {
  Row rows = row(2 * s.c);
  float *y = rows.get(), *d_logit = y + s.c;
  const float *pooled = tail.pooled + i * s.c, *gate = tail.gate + i * s.c;
  const float *weight = tail.weight, *bias = tail.bias;
#pragma GCC ivdep
  for (int64_t j = 0; j < s.c; j++) {
    y[j] = pooled[j] * weight[j] + bias[j];
    const float d_gate = weight[j] * sum_dx[j] + bias[j] * sum_d[j];
    d_logit[j] = d_gate * gate[j] * (1 - gate[j]);
  }
  along_channels<true>(d_logit, s.c, tail.kernel, tail.k, d_pooled);
  for (int64_t t = 0; t < tail.k; t++) {
    const int64_t shift = t - tail.k / 2, stop = std::min(s.c, s.c - shift);
    int64_t j = std::max(int64_t(0), -shift);
    double sums[LANES] = {}, sum = 0; // side by side: one sum would wait for itself
    for (; j + LANES <= stop; j += LANES)
      for (int64_t lane = 0; lane < LANES; lane++)
        sums[lane] += y[j + lane + shift] * d_logit[j + lane];
    for (; j < stop; j++)
      sum += y[j + shift] * d_logit[j];
    for (const double part : sums)
      sum += part;
    d_kernel[t] = sum;
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < s.c; j++) {
    sum_d[j] = gate[j] * sum_d[j] + d_pooled[j];
    sum_dx[j] = gate[j] * sum_dx[j] + d_pooled[j] * pooled[j];
  }
}

template <typename T>
void tail_backward(const Shape &s, const T *grad, const T *out, float ceiling, const T *z,
                   const Tail &tail, bool batch, T *d, float *d_weight, float *d_bias,
                   float *d_kernel, T *dz) {
  const int64_t nc = s.n * s.c, rows = tail.kernel ? s.n : 1;
  Row sum_d = row(nc), sum_dx = row(nc), on_grad = row(rows * s.c), constant = row(rows * s.c);
  Row on_z = row(s.c);
  auto sum = !out ? gradient_sums<T, false, false>
                  : (d ? gradient_sums<T, true, true> : gradient_sums<T, true, false>);
  sum(s, grad, out, ceiling, z, tail.mean, d, sum_d.get(), sum_dx.get());
  std::vector<double> of_samples(tail.kernel ? s.n * tail.k : 0);
#pragma omp parallel for schedule(static) if (nc > ALONE)
  for (int64_t i = 0; i < s.n; i++) {
    float *x = sum_dx.get() + i * s.c;
    for (int64_t j = 0; j < s.c; j++)
      x[j] *= tail.inverse_std[j]; // Σd·x̂
    if (tail.kernel)
      gate_backward(s, tail, i, sum_d.get() + i * s.c, x, constant.get() + i * s.c,
                    of_samples.data() + i * tail.k);
  }
  for (int64_t t = 0; tail.kernel && t < tail.k; t++) {
    double total = 0;
    for (int64_t i = 0; i < s.n; i++)
      total += of_samples[i * tail.k + t];
    d_kernel[t] = total;
  }
  std::vector<double> total_d(s.c), total_dx(s.c);
  over_rows(s, [&](int64_t at, int64_t) { return sum_d[at]; }, total_d);
  over_rows(s, [&](int64_t at, int64_t) { return sum_dx[at]; }, total_dx);
  std::copy(total_d.begin(), total_d.end(), d_bias);
  std::copy(total_dx.begin(), total_dx.end(), d_weight);
  if (!dz)
    return;
  // ∂z = on_grad · d + on_z · z + constant
  const float count = float(s.n) * s.pixels;
  Row through_mean = row(s.c);
  for (int64_t j = 0; j < s.c; j++) {
    const float a = tail.weight[j] * tail.inverse_std[j];
    on_z[j] = batch ? -a * tail.inverse_std[j] * d_weight[j] / count : 0.f;
    through_mean[j] = batch ? -a * d_bias[j] / count - on_z[j] * tail.mean[j] : 0.f;
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < s.c; j++) {
      const int64_t at = i * s.c + j;
      const float a = tail.weight[j] * tail.inverse_std[j];
      on_grad[at] = tail.kernel ? a * tail.gate[at] : a;
      constant[at] = tail.kernel ? a / s.pixels * constant[at] + through_mean[j] : through_mean[j];
    }
  const Factors by{on_grad.get(), constant.get(), tail.kernel ? s.c : 0, on_z.get()};
  const bool mask = out && !d; // d is masked already
  auto run = mask ? (batch ? gradient_input<T, true, true> : gradient_input<T, true, false>)
                  : (batch ? gradient_input<T, false, true> : gradient_input<T, false, false>);
  run(s, d ? d : grad, out, ceiling, z, by, dz);
}

// PyTorch's ReLU lets the gradient of an infinite output through: no number is above NaN.
float limit(float ceiling) { return std::isinf(ceiling) ? NAN : ceiling; }

} // namespace

extern "C" {

void eca_moments(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *z, float *mean,
                 float *variance) {
  const Shape s{nhwc, n, c, p};
  if (half)
    moments(s, (const bfloat16 *)z, mean, variance);
  else
    moments(s, (const float *)z, mean, variance);
}

void eca_scale_and_add(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *z,
                       const float *scale, const float *shift, int64_t step, const void *residual,
                       bool activation, void *out) {
  const Shape s{nhwc, n, c, p};
  const Factors by{scale, shift, step, scale};
  if (half)
    scale_and_add(s, (const bfloat16 *)z, by, (const bfloat16 *)residual, activation, NAN,
                  (bfloat16 *)out);
  else
    scale_and_add(s, (const float *)z, by, (const float *)residual, activation, NAN, (float *)out);
}

void eca_tail_forward(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *z,
                      const float *weight, const float *bias, const float *kernel, int64_t k,
                      float *kept, const void *residual, bool batch, float *running_mean,
                      float *running_variance, float momentum, float eps, bool activation,
                      float ceiling, void *out) {
  const Shape s{nhwc, n, c, p};
  const Tail tail(s, weight, bias, kernel, k, kept);
  const Running running{running_mean, running_variance, momentum};
  if (half)
    tail_forward(s, (const bfloat16 *)z, tail, (const bfloat16 *)residual, batch, running, eps,
                 activation, limit(ceiling), (bfloat16 *)out);
  else
    tail_forward(s, (const float *)z, tail, (const float *)residual, batch, running, eps,
                 activation, limit(ceiling), (float *)out);
}

void eca_tail_backward(bool half, bool nhwc, int64_t n, int64_t c, int64_t p, const void *z,
                       const float *weight, const float *bias, const float *kernel, int64_t k,
                       float *kept, const void *grad, const void *out, float ceiling, bool batch, void *d,
                       float *d_weight, float *d_bias, float *d_kernel, void *dz) {
  const Shape s{nhwc, n, c, p};
  const Tail tail(s, weight, bias, kernel, k, kept);
  if (half)
    tail_backward(s, (const bfloat16 *)grad, (const bfloat16 *)out, limit(ceiling),
                  (const bfloat16 *)z, tail, batch, (bfloat16 *)d, d_weight, d_bias, d_kernel,
                  (bfloat16 *)dz);
  else
    tail_backward(s, (const float *)grad, (const float *)out, limit(ceiling), (const float *)z,
                  tail, batch, (float *)d, d_weight, d_bias, d_kernel, (float *)dz);
}

} // extern "C"
