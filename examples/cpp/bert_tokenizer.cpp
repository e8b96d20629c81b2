#include "bert_tokenizer.h"

#include <stdexcept>

#include <unicode/normalizer2.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include "variant.h"

using nlohmann::json;

namespace {

void require(bool condition, const std::string& what) {
  if (!condition) {
    throw std::runtime_error("tokenizer.json " + what +
                             ", but this program knows BERT's WordPiece only. Use the Node "
                             "example, or a tokenizer library.");
  }
}

std::string type_of(const json& part) {
  return part.is_null() ? "none" : part.value("type", "unknown");
}

std::u32string to_code_points(const icu::UnicodeString& text) {
  std::u32string points;
  for (int32_t at = 0; at < text.length(); at = text.moveIndex32(at, 1)) {
    points.push_back(static_cast<char32_t>(text.char32At(at)));
  }
  return points;
}

std::string to_utf8(const std::u32string& points) {
  std::string text;
  icu::UnicodeString::fromUTF32(reinterpret_cast<const UChar32*>(points.data()),
                                static_cast<int32_t>(points.size()))
      .toUTF8String(text);
  return text;
}

bool is_space(char32_t c) { return u_hasBinaryProperty(c, UCHAR_WHITE_SPACE); }

// Control, format, private use and surrogate characters; unassigned ones are kept.
constexpr auto dropped_types = U_GC_C_MASK & ~U_GC_CN_MASK;

bool is_dropped(char32_t c) {
  const bool line = c == '\t' || c == '\n' || c == '\r';
  return c == 0xFFFD || (!line && (U_MASK(u_charType(c)) & dropped_types) != 0);
}

bool is_punctuation(char32_t c) {
  const bool ascii_symbol = c > ' ' && c < 0x7F && !u_isalnum(c);
  return ascii_symbol || (U_MASK(u_charType(c)) & U_GC_P_MASK) != 0;
}

bool is_chinese(char32_t c) {
  static constexpr char32_t ranges[][2] = {
      {0x4E00, 0x9FFF},   {0x3400, 0x4DBF},   {0x20000, 0x2A6DF}, {0x2A700, 0x2B73F},
      {0x2B740, 0x2B81F}, {0x2B920, 0x2CEAF}, {0xF900, 0xFAFF},   {0x2F800, 0x2FA1F}};
  for (const auto& [first, last] : ranges) {
    if (c >= first && c <= last) return true;
  }
  return false;
}

std::u32string without_accents(const std::u32string& points) {
  UErrorCode status = U_ZERO_ERROR;
  const auto* nfd = icu::Normalizer2::getNFDInstance(status);
  const auto text = icu::UnicodeString::fromUTF8(to_utf8(points));
  const auto decomposed = to_code_points(nfd->normalize(text, status));
  if (U_FAILURE(status)) throw std::runtime_error(u_errorName(status));
  std::u32string kept;
  for (char32_t c : decomposed) {
    if (u_charType(c) != U_NON_SPACING_MARK) kept.push_back(c);
  }
  return kept;
}

}  // namespace

BertTokenizer::BertTokenizer(const std::filesystem::path& folder) {
  const json settings = read_json(folder / "preprocessor.json");
  if (settings.at("kind") != "text") {
    throw std::runtime_error("this variant classifies images; this program takes texts only.");
  }
  max_length_ = settings.at("max_length");
  truncate_left_ = settings.value("truncation_side", "right") == "left";

  const json tokenizer = read_json(folder / "tokenizer.json");
  read_model(tokenizer.at("model"));
  read_normalizer(tokenizer.at("normalizer"));
  const std::string words = type_of(tokenizer.at("pre_tokenizer"));
  require(words == "BertPreTokenizer", "splits words by " + words);
  read_special_tokens(tokenizer.at("post_processor"));
  read_added_tokens(tokenizer.at("added_tokens"));
}

void BertTokenizer::read_model(const json& model) {
  require(type_of(model) == "WordPiece", "holds a model of type " + type_of(model));
  vocabulary_ = model.at("vocab").get<decltype(vocabulary_)>();
  unknown_ = vocabulary_.at(model.at("unk_token"));
  prefix_ = model.at("continuing_subword_prefix");
  max_word_ = model.at("max_input_chars_per_word");
}

void BertTokenizer::read_normalizer(const json& normalizer) {
  const std::string type = type_of(normalizer);
  require(type == "BertNormalizer", "normalizes by " + type);
  clean_ = normalizer.at("clean_text");
  chinese_ = normalizer.at("handle_chinese_chars");
  lowercase_ = normalizer.at("lowercase");
  const json& accents = normalizer.at("strip_accents");
  strip_accents_ = accents.is_null() ? lowercase_ : accents.get<bool>();
}

void BertTokenizer::read_special_tokens(const json& processor) {
  const std::string type = type_of(processor);
  if (type == "BertProcessing") {
    before_ = {processor.at("cls").at(1)};
    after_ = {processor.at("sep").at(1)};
  } else {
    require(type == "TemplateProcessing", "adds special tokens by " + type);
    Ids* side = &before_;
    for (const json& part : processor.at("single")) {
      if (part.contains("Sequence")) {
        side = &after_;
        continue;
      }
      const json& name = part.at("SpecialToken").at("id");
      const Ids ids = processor.at("special_tokens").at(name).at("ids");
      side->insert(side->end(), ids.begin(), ids.end());
    }
  }
  const std::size_t special = before_.size() + after_.size();
  require(special >= 2 && special <= max_length_, "adds " + std::to_string(special) + " tokens");
}

void BertTokenizer::read_added_tokens(const json& tokens) {
  for (const json& token : tokens) {
    const std::string content = token.at("content");
    for (const char* option : {"single_word", "lstrip", "rstrip", "normalized"}) {
      require(!token.at(option).get<bool>(), "has the added token " + content + " with " + option);
    }
    added_[content] = token.at("id");
  }
}

std::vector<std::int64_t> BertTokenizer::encode(const std::string& text) const {
  Ids inner;
  std::size_t start = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::pair<const std::string, std::int64_t>* longest = nullptr;
    for (const auto& token : added_) {
      const bool longer = longest == nullptr || token.first.size() > longest->first.size();
      if (longer && text.compare(at, token.first.size(), token.first) == 0) longest = &token;
    }
    if (longest == nullptr) {
      ++at;
      continue;
    }
    append_text(text.substr(start, at - start), inner);
    inner.push_back(longest->second);
    start = at += longest->first.size();
  }
  append_text(text.substr(start), inner);

  const std::size_t room = max_length_ - before_.size() - after_.size();
  if (inner.size() > room) {
    const auto surplus = static_cast<std::ptrdiff_t>(inner.size() - room);
    truncate_left_ ? inner.erase(inner.begin(), inner.begin() + surplus)
                   : inner.erase(inner.end() - surplus, inner.end());
  }
  inner.insert(inner.begin(), before_.begin(), before_.end());
  inner.insert(inner.end(), after_.begin(), after_.end());
  return inner;
}

void BertTokenizer::append_text(const std::string& text, Ids& ids) const {
  std::u32string points;
  for (char32_t c : to_code_points(icu::UnicodeString::fromUTF8(text))) {
    if (clean_ && is_dropped(c)) continue;
    const bool apart = chinese_ && is_chinese(c);
    if (apart) points.push_back(' ');
    points.push_back(clean_ && is_space(c) ? ' ' : c);
    if (apart) points.push_back(' ');
  }
  if (strip_accents_) points = without_accents(points);
  std::u32string word;
  for (char32_t c : points) {
    if (lowercase_) c = u_tolower(c);
    const bool punctuation = is_punctuation(c);
    if (!punctuation && !is_space(c)) {
      word.push_back(c);
      continue;
    }
    append_word(word, ids);
    word.clear();
    if (punctuation) append_word({c}, ids);
  }
  append_word(word, ids);
}

void BertTokenizer::append_word(const std::u32string& word, Ids& ids) const {
  if (word.empty()) return;
  Ids pieces;
  std::size_t start = word.size() > max_word_ ? word.size() : 0;
  while (start < word.size()) {
    std::size_t end = word.size();
    auto found = vocabulary_.end();
    for (; end > start; --end) {
      const std::string piece = to_utf8(word.substr(start, end - start));
      found = vocabulary_.find(start == 0 ? piece : prefix_ + piece);
      if (found != vocabulary_.end()) break;
    }
    if (end == start) {
      pieces.clear();
      break;
    }
    pieces.push_back(found->second);
    start = end;
  }
  if (pieces.empty()) pieces.push_back(unknown_);
  ids.insert(ids.end(), pieces.begin(), pieces.end());
}
