// Nearest class centres of a compiled encoder's features (LoRA Recycle, Eq. 3).
#pragma once

#include <ATen/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

class FewShot {
 public:
  // Loads a package written by `python -m lorarecycle.export --aoti`; throws std::runtime_error when it is none.
  explicit FewShot(const std::filesystem::path& package);

  // Computes the class centres: one class for each sub-folder of PNG and JPEG files, in the order of their names.
  void fit(const std::filesystem::path& support);

  struct Answer {
    std::string label;
    double probability;
  };

  // The nearest class and its probability for each image file.
  std::vector<Answer> predict(const std::vector<std::filesystem::path>& queries);

 private:
  at::Tensor features(const std::vector<std::filesystem::path>& files);  // float32 [n, D]
  at::Tensor logits(const at::Tensor& features) const;                    // float32 [Q, C]

  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
  int64_t image_size_ = 0;
  int64_t batch_size_ = 0;  // 0: any
  bool squash_ = false;
  double crop_pct_ = 1.0;
  std::string distance_;
  std::vector<std::string> classes_;
  at::Tensor centres_;  // float32 [C, D]
};
