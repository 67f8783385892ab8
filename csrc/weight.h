// Packing: rows of a stored tensor, as GGUF has them, into groups of 16 rows, and back.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace hb {

// Columns that are stored together.
int block_of(Scheme scheme);

// Bytes of one stored row, and of one packed group.
size_t row_bytes(Scheme scheme, int cols);
size_t group_bytes(Scheme scheme, int cols);

void pack_group(const Weight& w, const uint8_t* stored, int g);
// Whether every float in a packed group is finite: of plain schemes all, of blocks the scales.
bool is_finite(const Weight& w, int g);
void unpack_group(const Weight& w, uint8_t* stored, int g);

}  // namespace hb
