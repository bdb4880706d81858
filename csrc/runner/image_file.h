// PNG and JPEG files as pixels, through libpng and libjpeg.
#pragma once

#include <ATen/Tensor.h>

#include <filesystem>

// uint8 [1, 3, H, W], upright by its EXIF tag; grey becomes RGB, an alpha channel is dropped.
// Throws std::runtime_error that names the file when it is missing, damaged or neither PNG nor JPEG.
at::Tensor read_image(const std::filesystem::path& path);

// Whether the file name ends like one that `read_image` reads. Throws std::runtime_error for an image of another kind,
// which Python would read.
bool is_image_name(const std::filesystem::path& path);

// uint8 [1, 3, size, size]: the shorter side (with `squash` both sides) resized to size / crop_pct (bicubic, antialiased),
// the centre cropped; as torchvision does. An image of that size is taken as it is.
at::Tensor fit_image(const at::Tensor& image, int64_t size, bool squash, double crop_pct);
