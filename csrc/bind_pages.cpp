#include "bind.h"
#include "pages.h"

using namespace lilliput;

void bind_pages(nb::module_& m) {
  m.def("page_sums", [](Address from, Address into, long count, long block, Address sums) {  // one uint64 for every block; into: 0 = no copy
    for (long k = 0; k < count; k += block)
      at<uint64_t>(sums)[k / block] = pages().sum(at<const char>(from) + k, into ? at<char>(into) + k : nullptr, count - k < block ? count - k : block);
  }, Released());
}
