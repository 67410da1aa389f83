#include "bind.h"
#include "paged.h"

using namespace lilliput;

void bind_paged(nb::module_& m) {
  nb::class_<KvCache>(m, "KvCache").def("__init__", [](KvCache* c, int codec, int block, int kv_heads, int head_dim, Address keys, Address values,
                                                        Address key_scales, Address value_scales) {
    new (c) KvCache{KvCodec(codec), block, kv_heads, head_dim, at<void>(keys), at<void>(values), at<void>(key_scales), at<void>(value_scales)};
  });
  m.def("paged_write", [](const KvCache& c, int sequences, Address cu_q, Address lengths, Address tables, int table_stride, Address k, Address v, long stride) {
    paged_write(c, PagedBatch{sequences, at<int32_t>(cu_q), at<int32_t>(lengths), at<int32_t>(tables), table_stride}, at<float>(k), at<float>(v), stride);
  }, Released());
  m.def("paged_attention", [](const KvCache& c, int sequences, Address cu_q, Address lengths, Address tables, int table_stride, float scale, int window,
                              int sinks, Address cos, Address sin, Address mass, int mass_stride, int heads, Address q, long q_stride, Address o,
                                  long o_stride) {
    const PagedOptions options{scale, window, sinks, at<float>(cos), at<float>(sin), at<float>(mass), mass_stride};
    const PagedBatch batch{sequences, at<int32_t>(cu_q), at<int32_t>(lengths), at<int32_t>(tables), table_stride};
    paged_attention(c, batch, options, heads, at<float>(q), q_stride, at<float>(o), o_stride);
  }, Released());
}
