#include "linear.h"

#include "vec.h"

namespace lilliput {
extern const FloatKernels LILLIPUT_TABLE(linear_float) = {nullptr};
}
