#include "bind.h"

void bind_sparse(nb::module_& m) { (void)m; }
