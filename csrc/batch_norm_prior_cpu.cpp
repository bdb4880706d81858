// CPU implementation of batch_norm_prior: channel statistics of a map in NCHW or channels_last, and the gradient; where
// asked for also the frozen layer itself in the same pass, with the residual and the activation after it.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
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
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, v);
}

// Bounds of an activation: "none", "relu" or "relu6".
struct Activation {
  bool bounded_below, bounded_above;
  explicit Activation(std::string_view name) : bounded_below(name != "none"), bounded_above(name == "relu6") {}
  float top() const { return bounded_above ? 6.f : std::numeric_limits<float>::infinity(); }
};

// What is written beside the statistics: y = act(scale * x + shift + residual). Pointers are to the first value; y is
// null where only the statistics are asked for, residual where there is none.
template <typename T>
struct Layer {
  T* y;
  const T* residual;
  const float *scale, *shift;
  Activation activation;

  Layer from(int64_t value, int64_t channel) const {
    if (y == nullptr) return *this;
    return {y + value, residual == nullptr ? residual : residual + value, scale + channel, shift + channel, activation};
  }
  void write(int64_t at, const Vec& x, const Vec& a, const Vec& b) const {
    Vec z = at::vec::fmadd(x, a, b);
    if (residual != nullptr) z = z + load(residual + at);
    if (activation.bounded_below) {
      z = at::vec::minimum(at::vec::maximum(z, Vec(0.f)), Vec(activation.top()));  // NaN stays NaN
    }
    store(y + at, z);
  }
  void write(int64_t at, float x, float a, float b) const {
    float z = a * x + b;
    if (residual != nullptr) z += static_cast<float>(residual[at]);
    if (activation.bounded_below) z = z < 0.f ? 0.f : z > activation.top() ? activation.top() : z;
    y[at] = static_cast<T>(z);
  }
};

// Sums of (x - centre) and its square over n adjoining values of one channel, and the layer's output.
template <typename T>
void add_row(const T* x, const Layer<T>& layer, int64_t n, float centre, double& sum, double& square) {
  const bool writes = layer.y != nullptr;
  const float a = writes ? *layer.scale : 0.f, b = writes ? *layer.shift : 0.f;
  const Vec vcentre(centre), vscale(a), vshift(b);
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
      if (writes) {
        layer.write(i, x0, vscale, vshift);
        layer.write(i + kLanes, x1, vscale, vshift);
      }
    }
    sum += sum_lanes(s0 + s1);
    square += sum_lanes(q0 + q1);
  }
  for (; i < n; ++i) {
    const float value = static_cast<float>(x[i]), d = value - centre;
    sum += d;
    square += static_cast<double>(d) * d;
    if (writes) layer.write(i, value, a, b);
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

template <typename T>
void stats_nchw(const T* x, const Layer<T>& layer, int64_t B, int64_t C, int64_t P, float* mean, float* var) {
  at::parallel_for(0, C, std::max<int64_t>(1, 32768 / (B * P)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const float centre = rough_mean(x + c * P, std::min<int64_t>(P, 64), 1);
      double sum = 0., square = 0.;
      for (int64_t image = 0; image < B; ++image) {
        const int64_t first = (image * C + c) * P;
        add_row(x + first, layer.from(first, c), P, centre, sum, square);
      }
      finish(sum, square, static_cast<double>(B * P), centre, mean + c, var + c);
    }
  });
}

// Adds up kBlock channels of adjoining rows.
template <typename T>
void add_block(const T* x, const Layer<T>& layer, int64_t rows, int64_t C, const float* centre, double* sum,
               double* square) {
  float lanes[kLanes];
  const bool writes = layer.y != nullptr;
  Vec c[4], a[4], b[4];
  for (int64_t i = 0; i < 4; ++i) {
    c[i] = Vec::loadu(centre + i * kLanes);
    if (writes) a[i] = Vec::loadu(layer.scale + i * kLanes), b[i] = Vec::loadu(layer.shift + i * kLanes);
  }
  for (int64_t row = 0; row < rows;) {
    Vec s[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)}, q[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
    for (const int64_t stop = std::min(rows, row + kFlush); row < stop; ++row) {
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t at = row * C + i * kLanes;
        const Vec value = load(x + at), d = value - c[i];
        s[i] = s[i] + d;
        q[i] = at::vec::fmadd(d, d, q[i]);
        if (writes) layer.write(at, value, a[i], b[i]);
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
void stats_channels_last(const T* x, const Layer<T>& layer, int64_t rows, int64_t C, float* mean, float* var) {
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
      const Layer<T> part_layer = layer.from(from * C + first, first);
      double* sum = sums.data() + task / blocks * C + first;
      double* square = squares.data() + task / blocks * C + first;
      if (width == kBlock) {
        add_block(part, part_layer, n, C, centre.data() + first, sum, square);
        continue;
      }
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t c = 0; c < width; ++c) {
          const float value = static_cast<float>(part[row * C + c]), d = value - centre[first + c];
          sum[c] += d;
          square[c] += static_cast<double>(d) * d;
          if (part_layer.y != nullptr) part_layer.write(row * C + c, value, part_layer.scale[c], part_layer.shift[c]);
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

// dx = offset + slope * x + scale * dz, where dz is dy as far as the activation lets it through; dy may be null. The
// activation is seen from y, and dz written beside, where there was a residual; else it follows from scale * x + shift.
template <typename T>
struct Gradient {
  const T *x, *dy, *y;
  T *dx, *dresidual;
  Activation activation;

  void write(int64_t at, const Vec& offset, const Vec& slope, const Vec& scale, const Vec& shift) const {
    const Vec value = load(x + at);
    Vec out = at::vec::fmadd(value, slope, offset);
    if (dy != nullptr) {
      Vec dz = load(dy + at);
      if (activation.bounded_below) {
        const Vec z = y == nullptr ? at::vec::fmadd(value, scale, shift) : load(y + at);
        dz = dz & (z > Vec(0.f));
        if (activation.bounded_above) dz = dz & (z < Vec(activation.top()));
      }
      if (dresidual != nullptr) store(dresidual + at, dz);
      out = at::vec::fmadd(dz, scale, out);
    }
    store(dx + at, out);
  }
  void write(int64_t at, float offset, float slope, float scale, float shift) const {
    const float value = static_cast<float>(x[at]);
    float out = offset + slope * value;
    if (dy != nullptr) {
      float dz = static_cast<float>(dy[at]);
      if (activation.bounded_below) {
        const float z = y == nullptr ? scale * value + shift : static_cast<float>(y[at]);
        if (!(z > 0.f) || (activation.bounded_above && !(z < activation.top()))) dz = 0.f;
      }
      if (dresidual != nullptr) dresidual[at] = static_cast<T>(dz);
      out += scale * dz;
    }
    dx[at] = static_cast<T>(out);
  }
};

// n adjoining values of one channel, from `first`.
template <typename T>
void grad_row(const Gradient<T>& gradient, int64_t first, int64_t n, float offset, float slope, float scale,
              float shift) {
  const Vec voffset(offset), vslope(slope), vscale(scale), vshift(shift);
  int64_t i = first;
  for (; i + kLanes <= first + n; i += kLanes) gradient.write(i, voffset, vslope, vscale, vshift);
  for (; i < first + n; ++i) gradient.write(i, offset, slope, scale, shift);
}

// All channels of one pixel, from `first`.
template <typename T>
void grad_pixel(const Gradient<T>& gradient, int64_t first, int64_t C, const float* offset, const float* slope,
                const float* scale, const float* shift) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    gradient.write(first + c, Vec::loadu(offset + c), Vec::loadu(slope + c), Vec::loadu(scale + c),
                   Vec::loadu(shift + c));
  }
  for (; c < C; ++c) gradient.write(first + c, offset[c], slope[c], scale[c], shift[c]);
}

Tensor channels_of(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

// Factor and summand of the frozen layer.
struct Affine {
  std::vector<float> scale, shift;
  Affine(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight_in,
         const std::optional<Tensor>& bias_in, double eps)
      : scale(mean.numel()), shift(mean.numel()) {
    const Tensor weight = weight_in.has_value() ? channels_of(*weight_in) : Tensor();
    const Tensor bias = bias_in.has_value() ? channels_of(*bias_in) : Tensor();
    for (size_t c = 0; c < scale.size(); ++c) {
      scale[c] = 1.f / std::sqrt(var.const_data_ptr<float>()[c] + static_cast<float>(eps));
      if (weight.defined()) scale[c] *= weight.const_data_ptr<float>()[c];
      shift[c] = -mean.const_data_ptr<float>()[c] * scale[c];
      if (bias.defined()) shift[c] += bias.const_data_ptr<float>()[c];
    }
  }
};

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

// x is dense, NCHW or channels_last, residual laid out alike. Returns y, empty without the layer; the loss; means,
// variances and the two norms [2 C + 2].
std::tuple<Tensor, Tensor, Tensor> batch_norm_prior(const Tensor& x, const Tensor& rm_in, const Tensor& rv_in,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& residual, double eps,
                                                    std::string_view activation, bool with_layer) {
  const Tensor rm = channels_of(rm_in), rv = channels_of(rv_in);
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  const auto options = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  Tensor loss = at::empty({}, options), stats = at::empty({2 * C + 2}, options);
  const Tensor y = with_layer ? at::empty_like(x) : at::empty({0}, x.options());
  const Affine affine(rm, rv, weight, bias, eps);
  float* mean = stats.mutable_data_ptr<float>();
  float* var = mean + C;
  auto run = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    const Layer<T> layer{with_layer ? out : nullptr, data_or_null<T>(residual), affine.scale.data(),
                         affine.shift.data(), Activation(activation)};
    if (x.is_contiguous()) {
      stats_nchw(x.const_data_ptr<T>(), layer, B, C, P, mean, var);
    } else {
      stats_channels_last(x.const_data_ptr<T>(), layer, B * P, C, mean, var);
    }
  };
  AT_DISPATCH_SWITCH(x.scalar_type(), "batch_norm_prior",
    AT_DISPATCH_CASE(at::kFloat, [&] { run(y.mutable_data_ptr<scalar_t>()); })
    AT_DISPATCH_CASE(at::kBFloat16, [&] { run(y.mutable_data_ptr<scalar_t>()); }));
  const float* running_mean = rm.const_data_ptr<float>();
  const float* running_var = rv.const_data_ptr<float>();
  double mean_sum = 0., var_sum = 0.;
  for (int64_t c = 0; c < C; ++c) {
    const double dm = mean[c] - running_mean[c], dv = var[c] - running_var[c];
    mean_sum += dm * dm;
    var_sum += dv * dv;
  }
  float* norm = var + C;
  norm[0] = static_cast<float>(std::sqrt(mean_sum));
  norm[1] = static_cast<float>(std::sqrt(var_sum));
  *loss.mutable_data_ptr<float>() = norm[0] + norm[1];
  return {y, loss, stats};
}

// dy and y are laid out like x; y is there where there was a residual under an activation. Returns the gradients of x
// and of the residual; the latter is empty without y.
std::tuple<Tensor, Tensor> batch_norm_prior_backward(const std::optional<Tensor>& dy, const Tensor& dloss_in,
                                                     const Tensor& x, const std::optional<Tensor>& y,
                                                     const Tensor& rm_in, const Tensor& rv_in,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias, const Tensor& stats,
                                                     double eps, std::string_view activation) {
  const Tensor rm = channels_of(rm_in), rv = channels_of(rv_in), dloss = channels_of(dloss_in);
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  const bool masked = dy.has_value() && y.has_value();
  Tensor dx = at::empty_like(x), dresidual = masked ? at::empty_like(x) : at::empty({0}, x.options());
  const float* mean = stats.const_data_ptr<float>();
  const float* var = mean + C;
  const float* norm = var + C;
  const float* running_mean = rm.const_data_ptr<float>();
  const float* running_var = rv.const_data_ptr<float>();
  const double share = *dloss.const_data_ptr<float>() / static_cast<double>(B * P);
  const Affine affine(rm, rv, weight, bias, eps);
  std::vector<float> offset(C), slope(C);
  for (int64_t c = 0; c < C; ++c) {  // a norm of zero has gradient zero, as in PyTorch
    const double b = norm[1] == 0.f ? 0. : 2. * share * (var[c] - running_var[c]) / norm[1];
    const double a = norm[0] == 0.f ? 0. : share * (mean[c] - running_mean[c]) / norm[0];
    slope[c] = static_cast<float>(b);
    offset[c] = static_cast<float>(a - b * mean[c]);
  }
  auto run = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const Gradient<T> gradient{x.const_data_ptr<T>(), data_or_null<T>(dy), data_or_null<T>(y), to,
                               masked ? dresidual.mutable_data_ptr<T>() : nullptr, Activation(activation)};
    const float *scale = affine.scale.data(), *shift = affine.shift.data();
    if (x.is_contiguous()) {
      at::parallel_for(0, B * C, std::max<int64_t>(1, 32768 / P), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t c = i % C;
          grad_row(gradient, i * P, P, offset[c], slope[c], scale[c], shift[c]);
        }
      });
    } else {
      at::parallel_for(0, B * P, std::max<int64_t>(1, 32768 / C), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) grad_pixel(gradient, i * C, C, offset.data(), slope.data(), scale, shift);
      });
    }
  };
  AT_DISPATCH_SWITCH(x.scalar_type(), "batch_norm_prior_backward",
    AT_DISPATCH_CASE(at::kFloat, [&] { run(dx.mutable_data_ptr<scalar_t>()); })
    AT_DISPATCH_CASE(at::kBFloat16, [&] { run(dx.mutable_data_ptr<scalar_t>()); }));
  return {dx, dresidual};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorarecycle_cpu, m) {
  m.def("batch_norm_prior(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
        "Tensor? residual, float eps, str activation, bool layer) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_prior_backward(Tensor? dy, Tensor dloss, Tensor x, Tensor? y, Tensor running_mean, "
        "Tensor running_var, Tensor? weight, Tensor? bias, Tensor stats, float eps, str activation) -> "
        "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lorarecycle_cpu, CPU, m) {
  m.impl("batch_norm_prior", &batch_norm_prior);
  m.impl("batch_norm_prior_backward", &batch_norm_prior_backward);
}
