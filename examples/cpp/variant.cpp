#include "variant.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>

#include "bert_tokenizer.h"

using nlohmann::json;

namespace {

using Logits = std::vector<float>;

// Largest difference to the golden logits that rounding explains, relative to the largest of them.
double tolerance(const std::string& precision) {
  if (precision == "fp32") return 1e-3;
  if (precision == "fp16") return 1e-2;
  if (precision == "bf16") return 5e-2;
  return 1e-1;
}

std::size_t largest(const Logits& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

double probability(const Logits& logits, std::size_t label) {
  double sum = 0;
  for (float each : logits) sum += std::exp(static_cast<double>(each) - logits[label]);
  return 1 / sum;
}

struct Variant {
  std::vector<std::string> labels;
  std::string precision;
  BertTokenizer tokenizer;
  Predict predict;

  Logits logits(const std::string& text) const {
    auto ids = tokenizer.encode(text);
    Logits found = predict(ids);
    if (found.size() != labels.size()) {
      throw std::runtime_error("the model returns " + std::to_string(found.size()) +
                               " logits, but labels.json has " + std::to_string(labels.size()) +
                               " classes. Export the variant again.");
    }
    return found;
  }
};

// Number of golden rows that differ; each is reported on standard error.
int check_golden_rows(const Variant& variant, const json& golden) {
  const auto rows = golden.at("rows").get<std::vector<std::string>>();
  const auto expected = golden.at("logits").get<std::vector<Logits>>();
  if (rows.empty() || rows.size() != expected.size()) {
    throw std::runtime_error("golden.json needs one list of logits per row. Export again.");
  }
  double scale = 0, worst = 0;
  for (const Logits& logits : expected) {
    if (logits.size() != variant.labels.size()) {
      throw std::runtime_error("golden.json and labels.json do not fit. Export again.");
    }
    for (float each : logits) scale = std::max(scale, std::abs(static_cast<double>(each)));
  }
  const double allowed = tolerance(variant.precision) * scale;
  int different = 0;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const Logits found = variant.logits(rows[row]);
    double difference = 0;
    for (std::size_t at = 0; at < found.size(); ++at) {
      const double each = std::abs(static_cast<double>(found[at]) - expected[row][at]);
      if (std::isnan(each) || each > difference) difference = each;
    }
    const std::size_t label = largest(found), wanted = largest(expected[row]);
    if (label != wanted || !(difference <= allowed)) {
      ++different;
      std::fprintf(stderr, "golden row %zu differs: label %s, expected %s; logits differ by %.3g, "
                   "allowed %.3g\n", row + 1, variant.labels[label].c_str(),
                   variant.labels[wanted].c_str(), difference, allowed);
    }
    worst = std::max(worst, difference);
  }
  if (different == 0) {
    std::printf("%zu golden rows agree: logits differ by %.3g, allowed %.3g\n", rows.size(), worst,
                allowed);
  }
  return different;
}

Variant load_variant(const std::filesystem::path& folder, const std::string& runtime,
                     const Load& load) {
  const json manifest = read_json(folder / "manifest.json");
  if (manifest.at("format") != 1) {
    throw std::runtime_error("manifest.json is not of format 1. Export the variant again.");
  }
  const std::string found = manifest.at("runtime"), precision = manifest.at("precision");
  if (found != runtime) {
    throw std::runtime_error("the runtime of this variant is " + found + "; give a folder of " +
                             runtime + ".");
  }
  return {read_json(folder / "labels.json"), precision, BertTokenizer(folder),
          load(folder, precision)};
}

}  // namespace

json read_json(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path.string() + " cannot be opened. Give a variant's folder.");
  return json::parse(file);
}

int score(int argc, char** argv, const std::string& runtime, const Load& load) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FOLDER [TEXT ...]\n", argv[0]);
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    const Variant variant = load_variant(folder, runtime, load);
    if (check_golden_rows(variant, read_json(folder / "golden.json")) > 0) return 1;
    for (int at = 2; at < argc; ++at) {
      const Logits logits = variant.logits(argv[at]);
      const std::size_t label = largest(logits);
      std::printf("%s\t%.6f\n", variant.labels[label].c_str(), probability(logits, label));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
