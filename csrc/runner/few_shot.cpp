// Nearest class centres of a compiled encoder's features (LoRA Recycle, Eq. 3).
#include "few_shot.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <stdexcept>

#include "image_file.h"

namespace fs = std::filesystem;

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

constexpr int64_t kBatch = 16;

std::unique_ptr<Loader> load(const fs::path& package) {
  if (!fs::is_regular_file(package)) throw std::runtime_error("no package " + package.string() + ".");
  std::string reason;
  try {
    return std::make_unique<Loader>(package.string());
  } catch (const c10::Error& error) {
    reason = error.what_without_backtrace();
  } catch (const std::exception& error) {
    reason = error.what();
  }
  throw std::runtime_error(package.string() + " must be a whole package for this machine, got one that does not load (" +
                           reason + "); write it again with `python -m lorarecycle.export --aoti`.");
}

// Hidden files and what operating systems leave behind are no input, as in Python.
bool is_litter(const fs::path& path) {
  constexpr std::array kLitter = {"__macosx",     "thumbs.db",  "desktop.ini",              "@eadir",
                                  "$recycle.bin", "lost+found", "system volume information"};
  std::string name = path.filename().string();
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name.starts_with(".") || std::ranges::find(kLitter, name) != kLitter.end();
}

std::vector<fs::path> sorted_entries(const fs::path& folder) {
  std::vector<fs::path> entries;
  for (const auto& entry : fs::directory_iterator(folder)) entries.push_back(entry.path());
  std::sort(entries.begin(), entries.end());
  return entries;
}

// The images of a class, in its folder and all below; a link to a folder above leads nowhere new.
void add_images(const fs::path& folder, std::vector<fs::path> above, std::vector<fs::path>& files) {
  const fs::path own = fs::canonical(folder);
  for (fs::path path = own; path != path.root_path(); path = path.parent_path()) above.push_back(path);
  above.push_back(own.root_path());
  for (const auto& entry : sorted_entries(folder)) {
    if (is_litter(entry)) continue;
    if (fs::is_directory(entry)) {
      if (std::ranges::find(above, fs::canonical(entry)) == above.end()) add_images(entry, above, files);
    } else if (fs::is_regular_file(entry) && is_image_name(entry)) {
      files.push_back(entry);
    }
  }
}

}  // namespace

FewShot::FewShot(const fs::path& package) : loader_(load(package)) {
  const auto facts = loader_->get_metadata();
  for (const char* key : {"image_size", "batch_size", "distance"}) {
    if (!facts.contains(key)) {
      throw std::runtime_error(package.string() + " must be written by `python -m lorarecycle.export --aoti`, got a " +
                               "package without `" + key + "`.");
    }
  }
  image_size_ = std::stoll(facts.at("image_size"));
  batch_size_ = std::stoll(facts.at("batch_size"));
  distance_ = facts.at("distance");
  constexpr std::array kDistances = {"euclidean", "sqeuclidean", "cosine", "centred_cosine"};
  if (std::ranges::find(kDistances, distance_) == kDistances.end()) {
    throw std::runtime_error(package.string() + " asks for the distance " + distance_ +
                             ", which this program does not know; build it from the version that wrote the package.");
  }
  // absent from packages of earlier versions, which crop
  squash_ = facts.contains("resize") && facts.at("resize") == "squash";
  crop_pct_ = facts.contains("crop_pct") ? std::stod(facts.at("crop_pct")) : 1.0;
}

void FewShot::fit(const fs::path& support) {
  if (!fs::is_directory(support)) throw std::runtime_error("no support folder " + support.string() + ".");
  std::vector<at::Tensor> centres;
  for (const auto& folder : sorted_entries(support)) {
    if (!fs::is_directory(folder) || is_litter(folder)) continue;
    std::vector<fs::path> files;
    add_images(folder, {}, files);
    if (files.empty()) throw std::runtime_error(folder.string() + " must hold PNG or JPEG files, got none.");
    classes_.push_back(folder.filename().string());
    centres.push_back(features(files).mean(0));
  }
  if (classes_.empty()) {
    throw std::runtime_error(support.string() + " must hold a sub-folder of images per class, got no sub-folder.");
  }
  centres_ = at::stack(centres);
}

std::vector<FewShot::Answer> FewShot::predict(const std::vector<fs::path>& queries) {
  const auto [best, index] = logits(features(queries)).softmax(-1).max(-1);
  std::vector<Answer> answers;
  for (int64_t i = 0; i < best.size(0); ++i) {
    answers.push_back({classes_[index[i].item<int64_t>()], best[i].item<double>()});
  }
  return answers;
}

at::Tensor FewShot::features(const std::vector<fs::path>& files) {
  const auto n = int64_t(files.size());
  const int64_t step = batch_size_ > 0 ? batch_size_ : kBatch;
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < n; start += step) {
    std::vector<at::Tensor> batch;
    for (int64_t i = start; i < std::min(n, start + step); ++i) {
      batch.push_back(fit_image(read_image(files[i]), image_size_, squash_, crop_pct_));
    }
    const auto count = int64_t(batch.size());
    if (batch_size_ > 0) batch.resize(batch_size_, batch.back());  // a fixed batch is filled up
    parts.push_back(loader_->run({at::cat(batch)}).at(0).slice(0, 0, count));
  }
  return at::cat(parts);
}

at::Tensor FewShot::logits(const at::Tensor& features) const {
  const auto cosine = [](const at::Tensor& a, const at::Tensor& b) {
    const auto unit = [](const at::Tensor& x) { return x / x.norm(2, {-1}, true).clamp_min(1e-12); };
    return unit(a).matmul(unit(b).t()) - 1;
  };
  if (distance_ == "cosine") return cosine(features, centres_);
  if (distance_ == "centred_cosine") {  // the constants of lorarecycle/config.py
    const auto middle = 0.8 * centres_.mean(0, true);
    return 12 * cosine(features - middle, centres_ - middle);
  }
  const auto distance = at::cdist(features, centres_, 2, /*compute_mode=*/2);  // by differences: products cancel
  return distance_ == "sqeuclidean" ? -distance.square() : -distance;
}
