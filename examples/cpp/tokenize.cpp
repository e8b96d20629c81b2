// Prints the token ids of each text, one line a text.
#include <cstdio>
#include <exception>

#include "bert_tokenizer.h"

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FOLDER [TEXT ...]\n", argv[0]);
    return 2;
  }
  try {
    const BertTokenizer tokenizer(argv[1]);
    for (int at = 2; at < argc; ++at) {
      for (auto id : tokenizer.encode(argv[at])) std::printf("%lld ", static_cast<long long>(id));
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
