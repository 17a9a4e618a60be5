// Reads through io_uring, asked for with plain system calls; null where it is missing or forbidden.
#pragma once

#include <memory>

#include "io.h"

namespace fate {

std::unique_ptr<Reads> make_uring(int depth);

}  // namespace fate
