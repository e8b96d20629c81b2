// BERT's WordPiece tokenizer, from the tokenizer.json of a variant.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include <nlohmann/json.hpp>

// Maps a text to the same token ids as the Python package. Other kinds of tokenizers are refused
// with a std::runtime_error.
class BertTokenizer {
 public:
  // `folder`: a variant's folder; reads preprocessor.json and tokenizer.json.
  explicit BertTokenizer(const std::filesystem::path& folder);

  // Token ids of a UTF-8 text, with special tokens, at most `max_length` long.
  std::vector<std::int64_t> encode(const std::string& text) const;

 private:
  using Ids = std::vector<std::int64_t>;

  void read_normalizer(const nlohmann::json& normalizer);
  void read_model(const nlohmann::json& model);
  void read_special_tokens(const nlohmann::json& processor);
  void read_added_tokens(const nlohmann::json& tokens);
  void append_text(const std::string& text, Ids& ids) const;
  void append_word(const std::u32string& word, Ids& ids) const;

  bool clean_, chinese_, strip_accents_, lowercase_, truncate_left_;
  std::size_t max_length_, max_word_;
  std::string prefix_;
  std::int64_t unknown_;
  std::unordered_map<std::string, std::int64_t> vocabulary_;
  std::map<std::string, std::int64_t> added_;
  Ids before_, after_;
};
