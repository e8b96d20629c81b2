// A variant's folder: what it holds beside the model, and the check of its golden rows.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

// Logits of one row, from its token ids.
using Predict = std::function<std::vector<float>(std::vector<std::int64_t>& ids)>;

// Creates `Predict` from a variant's folder and precision.
using Load = std::function<Predict(const std::filesystem::path& folder, const std::string& precision)>;

nlohmann::json read_json(const std::filesystem::path& path);

// The whole program: FOLDER [TEXT ...]. Checks the golden rows, then prints the label and the
// score of each text. Returns the exit status: 0, 1 if a golden row differs, 2 on any error.
int score(int argc, char** argv, const std::string& runtime, const Load& load);
