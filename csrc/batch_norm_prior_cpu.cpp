// CPU implementation of batch_norm_prior: channel statistics of a feature map in NCHW or channels_last, and the gradient;
// with `scale` and `shift` also y = scale * x + shift, the frozen layer itself, in the same pass.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr int64_t kBlock = 4 * kLanes;   // channels that one task of the channels_last form handles at once
constexpr int64_t kFlush = 256;          // fp32 sums are added to fp64 ones after so many values

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const at::BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}
inline void store(float* p, const Vec& v) { v.store(p); }
inline void store(at::BFloat16* p, const Vec& v) {
  at::vec::convert_from_float<at::BFloat16>(v, v).store(p, kLanes);
}

inline float sum_lanes(const Vec& v) {
  float lanes[kLanes], sum = 0.f;
  v.store(lanes);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Sums of (x - centre) and its square over n adjoining values of one channel; y = scale * x + shift unless y is null.
template <typename T>
void add_row(const T* x, T* y, int64_t n, float centre, float scale, float shift, double& sum, double& square) {
  const Vec vcentre(centre), vscale(scale), vshift(shift);
  int64_t i = 0;
  while (i + 2 * kLanes <= n) {
    Vec s0(0.f), s1(0.f), q0(0.f), q1(0.f);
    const int64_t stop = std::min(n, i + kFlush * kLanes);
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) {
      const Vec x0 = load(x + i), x1 = load(x + i + kLanes);
      const Vec d0 = x0 - vcentre, d1 = x1 - vcentre;
      s0 = s0 + d0;
      s1 = s1 + d1;
      q0 = at::vec::fmadd(d0, d0, q0);
      q1 = at::vec::fmadd(d1, d1, q1);
      if (y != nullptr) {
        store(y + i, at::vec::fmadd(x0, vscale, vshift));
        store(y + i + kLanes, at::vec::fmadd(x1, vscale, vshift));
      }
    }
    sum += sum_lanes(s0 + s1);
    square += sum_lanes(q0 + q1);
  }
  for (; i < n; ++i) {
    const float value = static_cast<float>(x[i]), d = value - centre;
    sum += d;
    square += static_cast<double>(d) * d;
    if (y != nullptr) y[i] = static_cast<T>(scale * value + shift);
  }
}

// Mean of a first stretch of values: near the mean of all, so that the shifted sums do not cancel.
template <typename T>
float rough_mean(const T* x, int64_t n, int64_t stride) {
  double sum = 0.;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(x[i * stride]);
  return static_cast<float>(sum / n);
}

void finish(double sum, double square, double n, float centre, float* mean, float* var) {
  const double d = sum / n;
  *mean = static_cast<float>(centre + d);
  const double v = square / n - d * d;
  *var = static_cast<float>(v < 0. ? 0. : v);  // NaN stays NaN
}

// y is null where only the statistics are asked for; scale and shift are not read then.
template <typename T>
void stats_nchw(const T* x, T* y, int64_t B, int64_t C, int64_t P, const float* scale, const float* shift, float* mean,
                float* var) {
  at::parallel_for(0, C, std::max<int64_t>(1, 32768 / (B * P)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const float centre = rough_mean(x + c * P, std::min<int64_t>(P, 64), 1);
      const float a = y == nullptr ? 0.f : scale[c], b = y == nullptr ? 0.f : shift[c];
      double sum = 0., square = 0.;
      for (int64_t image = 0; image < B; ++image) {
        const int64_t first = (image * C + c) * P;
        add_row(x + first, y == nullptr ? y : y + first, P, centre, a, b, sum, square);
      }
      finish(sum, square, static_cast<double>(B * P), centre, mean + c, var + c);
    }
  });
}

// Adds up kBlock channels of adjoining rows.
template <typename T>
void add_block(const T* x, T* y, int64_t rows, int64_t C, const float* centre, const float* scale, const float* shift,
               double* sum, double* square) {
  float lanes[kLanes];
  Vec c[4], a[4], b[4];
  for (int64_t i = 0; i < 4; ++i) {
    c[i] = Vec::loadu(centre + i * kLanes);
    if (y != nullptr) a[i] = Vec::loadu(scale + i * kLanes), b[i] = Vec::loadu(shift + i * kLanes);
  }
  for (int64_t row = 0; row < rows;) {
    Vec s[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)}, q[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
    for (const int64_t stop = std::min(rows, row + kFlush); row < stop; ++row) {
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t at = row * C + i * kLanes;
        const Vec value = load(x + at), d = value - c[i];
        s[i] = s[i] + d;
        q[i] = at::vec::fmadd(d, d, q[i]);
        if (y != nullptr) store(y + at, at::vec::fmadd(value, a[i], b[i]));
      }
    }
    for (int64_t i = 0; i < 4; ++i) {
      s[i].store(lanes);
      for (int64_t k = 0; k < kLanes; ++k) sum[i * kLanes + k] += lanes[k];
      q[i].store(lanes);
      for (int64_t k = 0; k < kLanes; ++k) square[i * kLanes + k] += lanes[k];
    }
  }
}

// The map is cut into stretches of rows that fit the cache, whatever the number of threads: the same sums for all.
template <typename T>
void stats_channels_last(const T* x, T* y, int64_t rows, int64_t C, const float* scale, const float* shift, float* mean,
                         float* var) {
  const int64_t blocks = (C + kBlock - 1) / kBlock, stretch = std::max(kFlush, 65536 / C);
  const int64_t stretches = (rows + stretch - 1) / stretch;
  std::vector<float> centre(C);
  std::vector<double> sums(stretches * C), squares(stretches * C);
  for (int64_t c = 0; c < C; ++c) centre[c] = rough_mean(x + c, std::min<int64_t>(rows, 64), C);
  const int64_t grain = std::max<int64_t>(1, 32768 / (std::min(rows, stretch) * std::min(C, kBlock)));
  at::parallel_for(0, stretches * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task / blocks * stretch, n = std::min(stretch, rows - from);
      const int64_t first = task % blocks * kBlock, width = std::min(kBlock, C - first);
      const T* part = x + from * C + first;
      T* out = y == nullptr ? y : y + from * C + first;
      double* sum = sums.data() + task / blocks * C + first;
      double* square = squares.data() + task / blocks * C + first;
      if (width == kBlock) {
        add_block(part, out, n, C, centre.data() + first, y == nullptr ? scale : scale + first,
                  y == nullptr ? shift : shift + first, sum, square);
        continue;
      }
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t c = 0; c < width; ++c) {
          const float value = static_cast<float>(part[row * C + c]), d = value - centre[first + c];
          sum[c] += d;
          square[c] += static_cast<double>(d) * d;
          if (y != nullptr) out[row * C + c] = static_cast<T>(scale[first + c] * value + shift[first + c]);
        }
      }
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0., square = 0.;
    for (int64_t i = 0; i < stretches; ++i) sum += sums[i * C + c], square += squares[i * C + c];
    finish(sum, square, static_cast<double>(rows), centre[c], mean + c, var + c);
  }
}

// dx = offset + slope * x + scale * dy over adjoining values of one channel; dy may be null.
template <typename T>
void grad_row(const T* x, const T* dy, T* dx, int64_t n, float offset, float slope, float scale) {
  const Vec voffset(offset), vslope(slope), vscale(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec value = at::vec::fmadd(load(x + i), vslope, voffset);
    if (dy != nullptr) value = at::vec::fmadd(load(dy + i), vscale, value);
    store(dx + i, value);
  }
  for (; i < n; ++i) {
    const float value = offset + slope * static_cast<float>(x[i]);
    dx[i] = static_cast<T>(dy == nullptr ? value : value + scale * static_cast<float>(dy[i]));
  }
}

// The same over all channels of one pixel.
template <typename T>
void grad_pixel(const T* x, const T* dy, T* dx, int64_t C, const float* offset, const float* slope,
                const float* scale) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    Vec value = at::vec::fmadd(load(x + c), Vec::loadu(slope + c), Vec::loadu(offset + c));
    if (dy != nullptr) value = at::vec::fmadd(load(dy + c), Vec::loadu(scale + c), value);
    store(dx + c, value);
  }
  for (; c < C; ++c) {
    const float value = offset[c] + slope[c] * static_cast<float>(x[c]);
    dx[c] = static_cast<T>(dy == nullptr ? value : value + scale[c] * static_cast<float>(dy[c]));
  }
}

// x is dense, NCHW or channels_last; running statistics, scale and shift are fp32. Returns y, empty without a scale; the
// loss; mean and variance [2, C]; the two norms.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_prior(const Tensor& x, const Tensor& rm_in, const Tensor& rv_in,
                                                            const std::optional<Tensor>& scale_in,
                                                            const std::optional<Tensor>& shift_in) {
  const Tensor rm = rm_in.contiguous(), rv = rv_in.contiguous();
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  const auto options = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  Tensor loss = at::empty({}, options), stats = at::empty({2, C}, options), norms = at::empty({2}, options);
  const bool affine = scale_in.has_value();
  const Tensor y = affine ? at::empty_like(x) : at::empty({0}, x.options());
  const Tensor scale = affine ? scale_in->contiguous() : rm, shift = affine ? shift_in->contiguous() : rm;
  float* mean = stats.mutable_data_ptr<float>();
  float* var = mean + C;
  auto run = [&](auto* data, auto* out) {
    const float *a = scale.const_data_ptr<float>(), *b = shift.const_data_ptr<float>();
    if (!affine) out = nullptr;
    if (x.is_contiguous()) {
      stats_nchw(data, out, B, C, P, a, b, mean, var);
    } else {
      stats_channels_last(data, out, B * P, C, a, b, mean, var);
    }
  };
  AT_DISPATCH_SWITCH(x.scalar_type(), "batch_norm_prior",
    AT_DISPATCH_CASE(at::kFloat, [&] { run(x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>()); })
    AT_DISPATCH_CASE(at::kBFloat16, [&] { run(x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>()); }));
  const float* running_mean = rm.const_data_ptr<float>();
  const float* running_var = rv.const_data_ptr<float>();
  double mean_sum = 0., var_sum = 0.;
  for (int64_t c = 0; c < C; ++c) {
    const double dm = mean[c] - running_mean[c], dv = var[c] - running_var[c];
    mean_sum += dm * dm;
    var_sum += dv * dv;
  }
  float* norm = norms.mutable_data_ptr<float>();
  norm[0] = static_cast<float>(std::sqrt(mean_sum));
  norm[1] = static_cast<float>(std::sqrt(var_sum));
  *loss.mutable_data_ptr<float>() = norm[0] + norm[1];
  return {y, loss, stats, norms};
}

// dy has the layout of x; it and scale are there or not together.
Tensor batch_norm_prior_backward(const std::optional<Tensor>& dy, const Tensor& dloss, const Tensor& x,
                                 const Tensor& rm_in, const Tensor& rv_in, const Tensor& stats, const Tensor& norms,
                                 const std::optional<Tensor>& scale_in) {
  const Tensor rm = rm_in.contiguous(), rv = rv_in.contiguous();
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  Tensor dx = at::empty_like(x);
  const float* mean = stats.const_data_ptr<float>();
  const float* var = mean + C;
  const float* norm = norms.const_data_ptr<float>();
  const float* running_mean = rm.const_data_ptr<float>();
  const float* running_var = rv.const_data_ptr<float>();
  const double share = *dloss.const_data_ptr<float>() / static_cast<double>(B * P);
  std::vector<float> offset(C), slope(C);
  for (int64_t c = 0; c < C; ++c) {  // a norm of zero has gradient zero, as in PyTorch
    const double b = norm[1] == 0.f ? 0. : 2. * share * (var[c] - running_var[c]) / norm[1];
    const double a = norm[0] == 0.f ? 0. : share * (mean[c] - running_mean[c]) / norm[0];
    slope[c] = static_cast<float>(b);
    offset[c] = static_cast<float>(a - b * mean[c]);
  }
  const bool affine = dy.has_value();
  const Tensor scale = affine ? scale_in->contiguous() : rm, dy_or_x = affine ? *dy : x;
  auto run = [&](auto* from, auto* grad, auto* to) {
    if (!affine) grad = nullptr;
    const float* factor = scale.const_data_ptr<float>();
    auto shifted = [&](int64_t first) { return grad == nullptr ? grad : grad + first; };
    if (x.is_contiguous()) {
      at::parallel_for(0, B * C, std::max<int64_t>(1, 32768 / P), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          grad_row(from + i * P, shifted(i * P), to + i * P, P, offset[i % C], slope[i % C], factor[i % C]);
        }
      });
    } else {
      at::parallel_for(0, B * P, std::max<int64_t>(1, 32768 / C), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          grad_pixel(from + i * C, shifted(i * C), to + i * C, C, offset.data(), slope.data(), factor);
        }
      });
    }
  };
  AT_DISPATCH_SWITCH(x.scalar_type(), "batch_norm_prior_backward",
    AT_DISPATCH_CASE(at::kFloat, [&] {
      run(x.const_data_ptr<scalar_t>(), dy_or_x.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>());
    })
    AT_DISPATCH_CASE(at::kBFloat16, [&] {
      run(x.const_data_ptr<scalar_t>(), dy_or_x.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>());
    }));
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorarecycle_cpu, m) {
  m.def("batch_norm_prior(Tensor x, Tensor running_mean, Tensor running_var, Tensor? scale, Tensor? shift) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  m.def("batch_norm_prior_backward(Tensor? dy, Tensor dloss, Tensor x, Tensor running_mean, Tensor running_var, "
        "Tensor stats, Tensor norms, Tensor? scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorarecycle_cpu, CPU, m) {
  m.impl("batch_norm_prior", &batch_norm_prior);
  m.impl("batch_norm_prior_backward", &batch_norm_prior_backward);
}
