#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind.h"
#include "sampler.h"

using namespace lilliput;

namespace {

using Numbers = std::vector<double>;  // temperature, top_k, top_p, min_p, repetition, presence, frequency, u
using Ids = std::vector<int32_t>;

// One row's request: its numbers, the seen ids and how often in the answer, biased ids and biases, the address of its mask (0: none).
// None: the largest logit.
using Asked = std::optional<std::tuple<Numbers, Ids, Ids, Ids, std::vector<float>, Address>>;

nb::object choose(Address logits, long stride, int vocab, const std::vector<Asked>& asked, int top_count, Address top_ids, Address top_logprobs) {
  std::vector<SampleRow> how;
  how.reserve(asked.size());
  for (const Asked& one : asked) {
    if (!one) { how.push_back({0, 1, 0, 1, 0, 0, 0, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr}); continue; }
    const auto& [n, seen, times, bias_ids, bias, mask] = *one;
    if (n.size() != 8 || seen.size() != times.size()
        || bias_ids.size() != bias.size()) throw nb::value_error("a request is 8 numbers and lists of equal length");
    for (const Ids* ids : {&seen, &bias_ids})
      for (const int32_t id : *ids) if (id < 0 || id >= vocab) throw nb::value_error("a token id is outside the vocabulary");
    how.push_back({n[0], n[2], n[3], n[4], n[5], n[6], n[7], int(n[1]), int(seen.size()), int(bias_ids.size()), seen.data(), times.data(), bias_ids.data(),
                   bias.data(), at<uint32_t>(mask)});
  }
  std::vector<Sampled> out(how.size());
  {
    nb::gil_scoped_release released;
    sample(at<float>(logits), stride, vocab, int(how.size()), how.data(), out.data(), top_count, at<int32_t>(top_ids), at<double>(top_logprobs));
  }
  nb::list answer;
  for (const Sampled& s : out) answer.append(nb::make_tuple(s.token, s.logprob, s.total));
  return answer;
}

}  // namespace

void bind_sampler(nb::module_& m) { m.def("choose", &choose); }
