// Scores texts with an OpenVINO variant.
#include <openvino/openvino.hpp>

#include "variant.h"

namespace {

Predict load(const std::filesystem::path& folder, const std::string& precision) {
  ov::Core core;
  auto compiled = core.compile_model(
      (folder / "model.xml").string(), "CPU",
      ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
      ov::hint::inference_precision(precision == "bf16" ? ov::element::bf16 : ov::element::f32));
  auto request = compiled.create_infer_request();
  return [request](std::vector<std::int64_t>& ids) mutable {
    std::vector<std::int64_t> mask(ids.size(), 1);
    const ov::Shape shape{1, ids.size()};
    request.set_tensor("input_ids", ov::Tensor(ov::element::i64, shape, ids.data()));
    request.set_tensor("attention_mask", ov::Tensor(ov::element::i64, shape, mask.data()));
    request.infer();
    const ov::Tensor logits = request.get_output_tensor();
    const float* first = logits.data<float>();
    return std::vector<float>(first, first + logits.get_size());
  };
}

}  // namespace

int main(int argc, char** argv) { return score(argc, argv, "openvino", load); }
