// CPU implementation of cls_topk_gather: class-token attention, top-k patch tokens, gathered rows; and its scatter.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

// Dot product of two rows of n values, accumulated in fp32.
template <typename T>
float dot(const T* a, const T* b, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    Vec sum0(0.f), sum1(0.f);
    int64_t i = 0;
    for (; i + 2 * Vec::size() <= n; i += 2 * Vec::size()) {
      sum0 = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sum0);
      sum1 = at::vec::fmadd(Vec::loadu(a + i + Vec::size()), Vec::loadu(b + i + Vec::size()), sum1);
    }
    float sum = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum0 + sum1);
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
  } else {
    using VecT = at::vec::Vectorized<T>;
    Vec sum0(0.f), sum1(0.f);
    int64_t i = 0;
    for (; i + VecT::size() <= n; i += VecT::size()) {
      auto [a0, a1] = at::vec::convert_to_float<T>(VecT::loadu(a + i));
      auto [b0, b1] = at::vec::convert_to_float<T>(VecT::loadu(b + i));
      sum0 = at::vec::fmadd(a0, b0, sum0);
      sum1 = at::vec::fmadd(a1, b1, sum1);
    }
    float sum = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum0 + sum1);
    for (; i < n; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
    return sum;
  }
}

// scores[m] += softmax over all tokens of scale * logits; logits are overwritten.
void add_softmax(float* logits, float* scores, int64_t n, float scale) {
  float top = -INFINITY;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, logits[i]);
  at::vec::map<float>([=](Vec x) { return ((x - Vec(top)) * Vec(scale)).exp(); }, logits, logits, n);
  const float sum = at::vec::reduce_all<float>([](Vec x, Vec y) { return x + y; }, logits, n);
  at::vec::map2<float>([=](Vec s, Vec w) { return s + w / Vec(sum); }, scores, scores, logits, n);
}

template <typename T>
void select_image(const Tensor& q, const Tensor& k, int64_t b, int64_t num_keep, int64_t num_prefix, int64_t* index) {
  const int64_t H = q.size(1), M = q.size(2), d = q.size(3), N = M - num_prefix;
  std::vector<float> logits(M), scores(M, 0.f);
  const float scale = 1.f / std::sqrt(static_cast<float>(d));
  for (int64_t h = 0; h < H; ++h) {
    const T* q_row = q.const_data_ptr<T>() + b * q.stride(0) + h * q.stride(1);
    const T* k_row = k.const_data_ptr<T>() + b * k.stride(0) + h * k.stride(1);
    for (int64_t m = 0; m < M; ++m) logits[m] = dot(q_row, k_row + m * k.stride(2), d);
    add_softmax(logits.data(), scores.data(), M, scale);
  }
  const float* patch = scores.data() + num_prefix;
  std::vector<int64_t> order(N);
  std::iota(order.begin(), order.end(), 0);
  // NaN ranks first, as in a descending sort of PyTorch; ties go to the lower index.
  auto before = [patch](int64_t i, int64_t j) {
    const bool i_nan = std::isnan(patch[i]), j_nan = std::isnan(patch[j]);
    if (i_nan != j_nan) return i_nan;
    return !i_nan && patch[i] != patch[j] ? patch[i] > patch[j] : i < j;
  };
  if (num_keep < N) std::nth_element(order.begin(), order.begin() + num_keep, order.end(), before);
  std::sort(order.begin(), order.begin() + num_keep);
  std::copy_n(order.begin(), num_keep, index);
}

std::tuple<Tensor, Tensor> cls_topk_gather(
    const Tensor& q_in, const Tensor& k_in, const Tensor& x_in, int64_t num_keep, int64_t num_prefix) {
  const Tensor q = q_in.stride(3) == 1 ? q_in : q_in.contiguous();
  const Tensor k = k_in.stride(3) == 1 ? k_in : k_in.contiguous();
  const Tensor x = x_in.stride(2) == 1 ? x_in : x_in.contiguous();
  const int64_t B = x.size(0), D = x.size(2), rows = num_prefix + num_keep;
  Tensor out = at::empty({B, rows, D}, x.options());
  Tensor index = at::empty({B, num_keep}, x.options().dtype(at::kLong));
  const size_t row_bytes = D * x.element_size();
  const char* x_data = static_cast<const char*>(x.const_data_ptr());
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  int64_t* index_data = index.mutable_data_ptr<int64_t>();
  const int64_t image_bytes = x.stride(0) * x.element_size(), token_bytes = x.stride(1) * x.element_size();
  AT_DISPATCH_SWITCH(q.scalar_type(), "cls_topk_gather",
    AT_DISPATCH_CASE(at::kFloat, [&] {
      at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          select_image<scalar_t>(q, k, b, num_keep, num_prefix, index_data + b * num_keep);
      });
    })
    AT_DISPATCH_CASE(at::kBFloat16, [&] {
      at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          select_image<scalar_t>(q, k, b, num_keep, num_prefix, index_data + b * num_keep);
      });
    }));
  at::parallel_for(0, B * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows, row = i % rows;
      const int64_t token = row < num_prefix ? row : num_prefix + index_data[b * num_keep + row - num_prefix];
      std::memcpy(out_data + i * row_bytes, x_data + b * image_bytes + token * token_bytes, row_bytes);
    }
  });
  return {out, index};
}

Tensor scatter_tokens(const Tensor& dout_in, const Tensor& index_in, int64_t num_tokens, int64_t num_prefix) {
  const Tensor dout = dout_in.contiguous(), index = index_in.contiguous();
  const int64_t B = dout.size(0), rows = dout.size(1), D = dout.size(2), num_keep = rows - num_prefix;
  Tensor dx = at::empty({B, num_tokens, D}, dout.options());
  const size_t row_bytes = D * dout.element_size();
  const char* from = static_cast<const char*>(dout.const_data_ptr());
  char* to = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t* index_data = index.const_data_ptr<int64_t>();
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      char* image = to + b * num_tokens * row_bytes;
      const char* source = from + b * rows * row_bytes;
      std::memcpy(image, source, num_prefix * row_bytes);
      int64_t next = num_prefix;  // first token not written yet; kept positions ascend
      for (int64_t j = 0; j < num_keep; ++j) {
        const int64_t token = num_prefix + index_data[b * num_keep + j];
        std::memset(image + next * row_bytes, 0, (token - next) * row_bytes);
        std::memcpy(image + token * row_bytes, source + (num_prefix + j) * row_bytes, row_bytes);
        next = token + 1;
      }
      std::memset(image + next * row_bytes, 0, (num_tokens - next) * row_bytes);
    }
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorarecycle_cpu, m) {
  m.def("cls_topk_gather(Tensor q, Tensor k, Tensor x, int num_keep, int num_prefix) -> (Tensor, Tensor)");
  m.def("scatter_tokens(Tensor dout, Tensor index, int num_tokens, int num_prefix) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorarecycle_cpu, CPU, m) {
  m.impl("cls_topk_gather", &cls_topk_gather);
  m.impl("scatter_tokens", &scatter_tokens);
}
