#include "linear.h"

#include "vec.h"

namespace lilliput {
extern const IntKernels LILLIPUT_TABLE(linear_int) = {nullptr, nullptr};
}
