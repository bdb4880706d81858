// PNG and JPEG files as pixels, through libpng and libjpeg.
#include "image_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>

#include <jerror.h>
#include <png.h>

namespace {

using File = std::unique_ptr<FILE, int (*)(FILE*)>;

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& reason) {
  throw std::runtime_error("image file " + path.string() + " must be readable, got " + reason +
                           "; replace or remove it.");
}

// As Pillow: more pixels than this are taken for an attack.
constexpr int64_t kMaxPixels = 178956970;

// What a decoder fills. The caller owns it: a longjmp leaves locals that were changed since setjmp undefined.
struct Picture {
  std::vector<uint8_t> pixels;  // rows of RGB bytes
  std::vector<uint8_t*> rows;
  int64_t height = 0, width = 0;
  int orientation = 1;  // EXIF, 1 to 8
  char message[JMSG_LENGTH_MAX] = "";

  bool too_large() const { return height * width > kMaxPixels; }

  std::string size() const {
    return std::to_string(width) + " x " + std::to_string(height) + " pixels, more than " + std::to_string(kMaxPixels);
  }

  void allocate() {
    pixels.resize(size_t(height) * width * 3);
    for (int64_t y = 0; y < height; ++y) rows.push_back(pixels.data() + size_t(y) * width * 3);
  }
};

struct JpegError {
  jpeg_error_mgr base;
  std::jmp_buf escape;
  Picture* picture;
};

void leave_jpeg(j_common_ptr info) {
  auto* error = reinterpret_cast<JpegError*>(info->err);
  info->err->format_message(info, error->picture->message);
  std::longjmp(error->escape, 1);
}

// libjpeg only warns about a file that ends early; here that is an error. Its other warnings are of no account.
void warn_jpeg(j_common_ptr info, int level) {
  const int code = info->err->msg_code;
  if (level < 0 && (code == JWRN_JPEG_EOF || code == JWRN_HIT_MARKER)) leave_jpeg(info);
}

// The orientation tag of a TIFF block (1 to 8), 1 where there is none.
int tiff_orientation(const uint8_t* tiff, size_t length) {
  if (length < 8) return 1;
  const bool little = tiff[0] == 'I';
  auto number = [&](size_t at, int bytes) -> uint32_t {
    if (at + bytes > length) return 0;
    uint32_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= uint32_t(tiff[at + i]) << 8 * (little ? i : bytes - 1 - i);
    return value;
  };
  const size_t directory = number(4, 4);
  for (uint32_t i = 0, entries = number(directory, 2); i < entries; ++i) {
    const size_t entry = directory + 2 + size_t(12) * i;
    if (number(entry, 2) != 0x0112) continue;
    const uint32_t value = number(entry + 8, 2);
    return value >= 1 && value <= 8 ? int(value) : 1;
  }
  return 1;
}

int jpeg_orientation(const jpeg_decompress_struct& info) {
  for (auto* marker = info.marker_list; marker != nullptr; marker = marker->next) {
    const bool exif = marker->marker == JPEG_APP0 + 1 && marker->data_length >= 6;
    if (exif && std::memcmp(marker->data, "Exif\0\0", 6) == 0) {
      return tiff_orientation(marker->data + 6, marker->data_length - 6);
    }
  }
  return 1;
}

at::Tensor turn_upright(const at::Tensor& image, int orientation) {
  switch (orientation) {
    case 2: return image.flip(3);
    case 3: return image.flip({2, 3});
    case 4: return image.flip(2);
    case 5: return image.transpose(2, 3);
    case 6: return image.transpose(2, 3).flip(3);
    case 7: return image.transpose(2, 3).flip({2, 3});
    case 8: return image.transpose(2, 3).flip(2);
    default: return image;
  }
}

void read_jpeg(const std::filesystem::path& path, FILE* file, Picture& picture) {
  jpeg_decompress_struct info{};
  JpegError error{};
  error.picture = &picture;
  info.err = jpeg_std_error(&error.base);
  error.base.error_exit = leave_jpeg;
  error.base.emit_message = warn_jpeg;
  if (setjmp(error.escape)) {
    jpeg_destroy_decompress(&info);
    fail(path, picture.message);
  }
  jpeg_create_decompress(&info);
  jpeg_stdio_src(&info, file);
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&info, TRUE);
  picture.height = info.image_height;
  picture.width = info.image_width;
  const bool cmyk = info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK;
  if (cmyk || picture.too_large()) {
    jpeg_destroy_decompress(&info);
    fail(path, cmyk ? "a CMYK picture, save it as RGB" : picture.size());
  }
  picture.allocate();
  picture.orientation = jpeg_orientation(info);
  info.out_color_space = JCS_RGB;
  jpeg_start_decompress(&info);
  while (info.output_scanline < info.output_height) {
    jpeg_read_scanlines(&info, &picture.rows[info.output_scanline], 1);
  }
  jpeg_finish_decompress(&info);
  jpeg_destroy_decompress(&info);
}

void read_png(const std::filesystem::path& path, FILE* file, Picture& picture) {
  auto on_error = [](png_structp png, png_const_charp message) {
    auto* error = static_cast<Picture*>(png_get_error_ptr(png))->message;
    std::snprintf(error, JMSG_LENGTH_MAX, "%s", message);
    std::longjmp(png_jmpbuf(png), 1);
  };
  auto on_warning = [](png_structp, png_const_charp) {};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &picture, on_error, on_warning);
  png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
  if (info == nullptr) {
    png_destroy_read_struct(&png, nullptr, nullptr);
    fail(path, "no memory or another libpng than at build time");
  }
  if (setjmp(png_jmpbuf(png))) {
    png_destroy_read_struct(&png, &info, nullptr);
    fail(path, picture.message);
  }
  png_init_io(png, file);
  png_read_info(png, info);
  picture.height = png_get_image_height(png, info);
  picture.width = png_get_image_width(png, info);
  if (picture.too_large()) {
    png_destroy_read_struct(&png, &info, nullptr);
    fail(path, picture.size());
  }
  picture.allocate();
  if (png_get_bit_depth(png, info) == 16) {
    // Pillow rounds 16-bit grey and keeps the high byte of 16-bit colours
    const bool grey = png_get_color_type(png, info) == PNG_COLOR_TYPE_GRAY;
    grey ? png_set_scale_16(png) : png_set_strip_16(png);
  }
  png_set_expand(png);
  png_set_gray_to_rgb(png);
  png_set_strip_alpha(png);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  png_read_image(png, picture.rows.data());
  png_read_end(png, info);
#ifdef PNG_eXIf_SUPPORTED
  png_uint_32 length = 0;
  png_bytep exif = nullptr;
  if (png_get_eXIf_1(png, info, &length, &exif)) picture.orientation = tiff_orientation(exif, length);
#endif
  png_destroy_read_struct(&png, &info, nullptr);
}

std::string lower_suffix(const std::filesystem::path& path) {
  std::string suffix = path.extension().string();
  std::transform(suffix.begin(), suffix.end(), suffix.begin(), [](unsigned char c) { return std::tolower(c); });
  return suffix;
}

}  // namespace

at::Tensor read_image(const std::filesystem::path& path) {
  File file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw std::runtime_error("no image file " + path.string() + ".");
  uint8_t head[8] = {};
  const size_t got = std::fread(head, 1, sizeof head, file.get());
  std::rewind(file.get());
  Picture picture;
  if (got == sizeof head && png_sig_cmp(head, 0, sizeof head) == 0) {
    read_png(path, file.get(), picture);
  } else if (got >= 3 && head[0] == 0xFF && head[1] == 0xD8 && head[2] == 0xFF) {
    read_jpeg(path, file.get(), picture);
  } else {
    fail(path, "neither PNG nor JPEG");
  }
  const at::Tensor rows = at::from_blob(picture.pixels.data(), {1, picture.height, picture.width, 3}, at::kByte);
  return turn_upright(rows.permute({0, 3, 1, 2}), picture.orientation).clone(at::MemoryFormat::Contiguous);
}

bool is_image_name(const std::filesystem::path& path) {
  const std::string suffix = lower_suffix(path);
  for (const char* other : {".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".pbm", ".pnm", ".gif", ".avif", ".jp2",
                            ".heic", ".heif"}) {
    if (suffix == other) {
      throw std::runtime_error("image file " + path.string() + " must be PNG or JPEG, got " + suffix + "; convert it.");
    }
  }
  for (const char* own : {".png", ".jpg", ".jpeg", ".jpe", ".jfif"}) {
    if (suffix == own) return true;
  }
  return false;
}

at::Tensor fit_image(const at::Tensor& image, int64_t size, bool squash, double crop_pct) {
  int64_t height = image.size(2), width = image.size(3);
  if (height == size && width == size) return image;
  const auto side = int64_t(double(size) / crop_pct);
  at::Tensor fitted = image;
  if (squash) {
    height = width = side;
  } else if (std::min(height, width) != side) {
    const int64_t longer = int64_t(double(side * std::max(height, width)) / double(std::min(height, width)));
    (height <= width ? width : height) = longer;
    (image.size(2) <= image.size(3) ? height : width) = side;
  }
  if (height != image.size(2) || width != image.size(3)) {
    fitted = at::_upsample_bicubic2d_aa(image, {height, width}, /*align_corners=*/false);
  }
  // halves go to the even side, as Python's round
  const int64_t top = int64_t(std::nearbyint(double(height - size) / 2));
  const int64_t left = int64_t(std::nearbyint(double(width - size) / 2));
  return fitted.slice(2, top, top + size).slice(3, left, left + size).contiguous();
}
