// Scores texts with an AOTInductor variant. Its model.pt2 holds a native library: run only
// variants that you trust.
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "variant.h"

namespace {

Predict load(const std::filesystem::path& folder, const std::string& /*precision*/) {
  auto package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(
      (folder / "model.pt2").string());
  return [package](std::vector<std::int64_t>& ids) {
    const c10::InferenceMode guard;
    std::vector<std::int64_t> mask(ids.size(), 1);
    const std::vector<std::int64_t> shape{1, static_cast<std::int64_t>(ids.size())};
    const at::Tensor logits = package
                                  ->run({at::from_blob(ids.data(), shape, at::kLong),
                                         at::from_blob(mask.data(), shape, at::kLong)})
                                  .at(0)
                                  .to(at::kFloat)
                                  .contiguous();
    const float* first = logits.const_data_ptr<float>();
    return std::vector<float>(first, first + logits.numel());
  };
}

}  // namespace

int main(int argc, char** argv) { return score(argc, argv, "aotinductor", load); }
