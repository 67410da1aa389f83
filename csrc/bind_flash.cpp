#include "bind.h"

void bind_flash(nb::module_& m) { (void)m; }
