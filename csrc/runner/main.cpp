// lorarecycle-predict PACKAGE --support DIR --query IMAGE...: prints file, class and probability, parted by tabs.
#include <c10/util/Exception.h>
#include <c10/core/InferenceMode.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "few_shot.h"

namespace {

constexpr const char* kUsage = "usage: lorarecycle-predict PACKAGE --support DIR --query IMAGE...";

struct Arguments {
  std::filesystem::path package, support;
  std::vector<std::filesystem::path> queries;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  std::string flag;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.starts_with("--")) {
      if (word != "--support" && word != "--query") throw std::runtime_error("unknown flag " + word + "; " + kUsage);
      flag = word;
    } else if (flag == "--query") {
      arguments.queries.emplace_back(word);
    } else if (flag == "--support") {
      arguments.support = word;
      flag.clear();
    } else if (arguments.package.empty()) {
      arguments.package = word;
    } else {
      throw std::runtime_error("one package only, got " + word + "; " + kUsage);
    }
  }
  if (arguments.package.empty() || arguments.support.empty() || arguments.queries.empty()) {
    throw std::runtime_error(kUsage);
  }
  return arguments;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--help") == 0) {
    std::puts(kUsage);
    return 0;
  }
  try {
    const Arguments arguments = parse(argc, argv);
    const c10::InferenceMode guard;
    FewShot classifier(arguments.package);
    classifier.fit(arguments.support);
    const auto answers = classifier.predict(arguments.queries);
    for (size_t i = 0; i < answers.size(); ++i) {
      std::printf("%s\t%s\t%.4f\n", arguments.queries[i].c_str(), answers[i].label.c_str(), answers[i].probability);
    }
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "lorarecycle-predict: error: %s\n", error.what_without_backtrace());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "lorarecycle-predict: error: %s\n", error.what());
    return 2;
  }
}
