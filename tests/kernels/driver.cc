// Runs kernels on random sizes and compares them with plain loops: for the sanitizers, no XLA here.
#include "driver.h"

#include <cstring>

int main(int argc, char** argv) {
  const struct {
    const char* name;
    bool (*run)(Random&);
  } kernels[] = {
      {"product", product},
      {"convolution", convolution},
      {"binary_product", binary_product},
      {"binary_convolution", binary_convolution},
      {"sparse_blocks", sparse_blocks},
      {"sparse_pairs", sparse_pairs},
  };
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  const int first = argc > 3 ? std::atoi(argv[3]) : 0;
  for (const auto& kernel : kernels) {
    if (argc > 2 && std::strcmp(argv[2], kernel.name)) continue;
    for (int i = first; i < first + count; i++) {
      Random r{std::mt19937((unsigned)i)};
      if (!kernel.run(r)) {
        std::printf("%s failed at case %d on %s\n", kernel.name, i, jom::kIsa);
        return 1;
      }
    }
    std::printf("%d cases of %s on %s\n", count, kernel.name, jom::kIsa);
  }
}
