// CPU implementation of batch_norm_prior: channel statistics of a feature map in NCHW or channels_last, and the gradient.

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

// Sums of (x - shift) and its square over n adjoining values.
template <typename T>
void add_row(const T* x, int64_t n, float shift, double& sum, double& square) {
  const Vec vshift(shift);
  int64_t i = 0;
  while (i + 2 * kLanes <= n) {
    Vec s0(0.f), s1(0.f), q0(0.f), q1(0.f);
    const int64_t stop = std::min(n, i + kFlush * kLanes);
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) {
      const Vec d0 = load(x + i) - vshift, d1 = load(x + i + kLanes) - vshift;
      s0 = s0 + d0;
      s1 = s1 + d1;
      q0 = at::vec::fmadd(d0, d0, q0);
      q1 = at::vec::fmadd(d1, d1, q1);
    }
    sum += sum_lanes(s0 + s1);
    square += sum_lanes(q0 + q1);
  }
  for (; i < n; ++i) {
    const float d = static_cast<float>(x[i]) - shift;
    sum += d;
    square += static_cast<double>(d) * d;
  }
}

// Mean of a first stretch of values: near the mean of all, so that the shifted sums do not cancel.
template <typename T>
float rough_mean(const T* x, int64_t n, int64_t stride) {
  double sum = 0.;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(x[i * stride]);
  return static_cast<float>(sum / n);
}

void finish(double sum, double square, double n, float shift, float* mean, float* var) {
  const double d = sum / n;
  *mean = static_cast<float>(shift + d);
  const double v = square / n - d * d;
  *var = static_cast<float>(v < 0. ? 0. : v);  // NaN stays NaN
}

template <typename T>
void stats_nchw(const T* x, int64_t B, int64_t C, int64_t P, float* mean, float* var) {
  at::parallel_for(0, C, std::max<int64_t>(1, 32768 / (B * P)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const float shift = rough_mean(x + c * P, std::min<int64_t>(P, 64), 1);
      double sum = 0., square = 0.;
      for (int64_t b = 0; b < B; ++b) add_row(x + (b * C + c) * P, P, shift, sum, square);
      finish(sum, square, static_cast<double>(B * P), shift, mean + c, var + c);
    }
  });
}

template <typename T>
void stats_channels_last(const T* x, int64_t rows, int64_t C, float* mean, float* var) {
  const int64_t blocks = (C + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, std::max<int64_t>(1, 32768 / (rows * kBlock)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, width = std::min(kBlock, C - first);
      float shift[kBlock] = {}, lanes[kBlock];
      double sum[kBlock] = {}, square[kBlock] = {};
      for (int64_t c = 0; c < width; ++c) shift[c] = rough_mean(x + first + c, std::min<int64_t>(rows, 64), C);
      if (width == kBlock) {
        for (int64_t row = 0; row < rows;) {
          Vec s[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)}, q[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
          const Vec v0 = Vec::loadu(shift), v1 = Vec::loadu(shift + kLanes), v2 = Vec::loadu(shift + 2 * kLanes),
                    v3 = Vec::loadu(shift + 3 * kLanes);
          for (const int64_t stop = std::min(rows, row + kFlush); row < stop; ++row) {
            const T* p = x + row * C + first;
            const Vec d0 = load(p) - v0, d1 = load(p + kLanes) - v1, d2 = load(p + 2 * kLanes) - v2,
                      d3 = load(p + 3 * kLanes) - v3;
            s[0] = s[0] + d0, s[1] = s[1] + d1, s[2] = s[2] + d2, s[3] = s[3] + d3;
            q[0] = at::vec::fmadd(d0, d0, q[0]), q[1] = at::vec::fmadd(d1, d1, q[1]);
            q[2] = at::vec::fmadd(d2, d2, q[2]), q[3] = at::vec::fmadd(d3, d3, q[3]);
          }
          for (int64_t i = 0; i < 4; ++i) s[i].store(lanes + i * kLanes);
          for (int64_t c = 0; c < kBlock; ++c) sum[c] += lanes[c];
          for (int64_t i = 0; i < 4; ++i) q[i].store(lanes + i * kLanes);
          for (int64_t c = 0; c < kBlock; ++c) square[c] += lanes[c];
        }
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t c = 0; c < width; ++c) {
            const float d = static_cast<float>(x[row * C + first + c]) - shift[c];
            sum[c] += d;
            square[c] += static_cast<double>(d) * d;
          }
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        finish(sum[c], square[c], static_cast<double>(rows), shift[c], mean + first + c, var + first + c);
      }
    }
  });
}

// dx = offset[c] + slope[c] * x over adjoining values of one channel.
template <typename T>
void scale_row(const T* x, T* dx, int64_t n, float offset, float slope) {
  const Vec voffset(offset), vslope(slope);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dx + i, at::vec::fmadd(load(x + i), vslope, voffset));
  for (; i < n; ++i) dx[i] = static_cast<T>(offset + slope * static_cast<float>(x[i]));
}

// The same over all channels of one pixel.
template <typename T>
void scale_pixel(const T* x, T* dx, int64_t C, const float* offset, const float* slope) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    store(dx + c, at::vec::fmadd(load(x + c), Vec::loadu(slope + c), Vec::loadu(offset + c)));
  }
  for (; c < C; ++c) dx[c] = static_cast<T>(offset[c] + slope[c] * static_cast<float>(x[c]));
}

// x is dense, NCHW or channels_last; running statistics are fp32.
std::tuple<Tensor, Tensor, Tensor> batch_norm_prior(const Tensor& x, const Tensor& rm_in, const Tensor& rv_in) {
  const Tensor rm = rm_in.contiguous(), rv = rv_in.contiguous();
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  const auto options = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  Tensor loss = at::empty({}, options), stats = at::empty({2, C}, options), norms = at::empty({2}, options);
  float* mean = stats.mutable_data_ptr<float>();
  float* var = mean + C;
  auto run = [&](auto* data) {
    if (x.is_contiguous()) {
      stats_nchw(data, B, C, P, mean, var);
    } else {
      stats_channels_last(data, B * P, C, mean, var);
    }
  };
  AT_DISPATCH_SWITCH(x.scalar_type(), "batch_norm_prior",
    AT_DISPATCH_CASE(at::kFloat, [&] { run(x.const_data_ptr<scalar_t>()); })
    AT_DISPATCH_CASE(at::kBFloat16, [&] { run(x.const_data_ptr<scalar_t>()); }));
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
  return {loss, stats, norms};
}

Tensor batch_norm_prior_backward(const Tensor& dloss, const Tensor& x, const Tensor& rm_in, const Tensor& rv_in,
                                 const Tensor& stats, const Tensor& norms) {
  const Tensor rm = rm_in.contiguous(), rv = rv_in.contiguous();
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  Tensor dx = at::empty_like(x);
  const float* mean = stats.const_data_ptr<float>();
  const float* var = mean + C;
  const float* norm = norms.const_data_ptr<float>();
  const float* running_mean = rm.const_data_ptr<float>();
  const float* running_var = rv.const_data_ptr<float>();
  const double scale = *dloss.const_data_ptr<float>() / static_cast<double>(B * P);
  std::vector<float> offset(C), slope(C);
  for (int64_t c = 0; c < C; ++c) {  // a norm of zero has gradient zero, as in PyTorch
    const double b = norm[1] == 0.f ? 0. : 2. * scale * (var[c] - running_var[c]) / norm[1];
    const double a = norm[0] == 0.f ? 0. : scale * (mean[c] - running_mean[c]) / norm[0];
    slope[c] = static_cast<float>(b);
    offset[c] = static_cast<float>(a - b * mean[c]);
  }
  auto run = [&](auto* from, auto* to) {
    if (x.is_contiguous()) {
      at::parallel_for(0, B * C, std::max<int64_t>(1, 32768 / P), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) scale_row(from + i * P, to + i * P, P, offset[i % C], slope[i % C]);
      });
    } else {
      at::parallel_for(0, B * P, std::max<int64_t>(1, 32768 / C), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) scale_pixel(from + i * C, to + i * C, C, offset.data(), slope.data());
      });
    }
  };
  AT_DISPATCH_SWITCH(x.scalar_type(), "batch_norm_prior_backward",
    AT_DISPATCH_CASE(at::kFloat, [&] { run(x.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>()); })
    AT_DISPATCH_CASE(at::kBFloat16, [&] { run(x.const_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>()); }));
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorarecycle_cpu, m) {
  m.def("batch_norm_prior(Tensor x, Tensor running_mean, Tensor running_var) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_prior_backward(Tensor dloss, Tensor x, Tensor running_mean, Tensor running_var, Tensor stats, "
        "Tensor norms) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorarecycle_cpu, CPU, m) {
  m.impl("batch_norm_prior", &batch_norm_prior);
  m.impl("batch_norm_prior_backward", &batch_norm_prior_backward);
}
