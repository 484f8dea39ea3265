// Products on AMX tiles: eight registers of 16 rows by 64 bytes. Included by files compiled for the level `amx` only.
#pragma once
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

// All eight tiles at full size for as long as this lives; what the thread had configured comes back afterwards, since
// torch's own kernels remember that they have configured it.
class Tiles {
  public:
    Tiles() {
        Config full{};
        full.palette = 1;
        for (int k = 0; k < 8; ++k) full.column_bytes[k] = 64, full.rows[k] = 16;
        asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before_) : "m"(full));
    }
    ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t column_bytes[16];
        uint8_t rows[16];
    };
    Config before_;
};

// The intrinsics do not tell the compiler that a tile load reads memory.
DIFUSORES_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// Of the operands of c += a b: a's tiles of 16 rows by 32 bf16, b's of 16 pairs of rows by 16 columns, c's of 16 rows
// by 16 fp32, 64 bytes.
struct TileProduct {
    const char* a;
    int64_t a_row, a_tile, a_step;  // bytes from row to row, from one tile of rows to the next, from one step in depth
    const char* b;                  // [depth / 2, columns] of pairs
    int64_t b_row, b_tile;          // bytes from row to row, from one tile of columns to the next
    char* c;                        // [rows, columns] of fp32
    int64_t c_row;                  // bytes from row to row
    int64_t depth;                  // in steps of 32
};

// kDown x kAcross tiles of c, at most 2 x 2.
template <int kDown, int kAcross>
void tile_product(const TileProduct& p, bool accumulate) {
    char* const c1 = p.c + 16 * p.c_row;
    if (accumulate) {
        _tile_loadd(0, p.c, p.c_row);
        if constexpr (kAcross == 2) _tile_loadd(1, p.c + 64, p.c_row);
        if constexpr (kDown == 2) _tile_loadd(2, c1, p.c_row);
        if constexpr (kDown == 2 && kAcross == 2) _tile_loadd(3, c1 + 64, p.c_row);
    } else {
        _tile_zero(0);
        if constexpr (kAcross == 2) _tile_zero(1);
        if constexpr (kDown == 2) _tile_zero(2);
        if constexpr (kDown == 2 && kAcross == 2) _tile_zero(3);
    }
    const char *a = p.a, *b = p.b;
    for (int64_t step = 0; step < p.depth; ++step, a += p.a_step, b += 16 * p.b_row) {
        _tile_loadd(4, a, p.a_row);
        _tile_loadd(6, b, p.b_row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kAcross == 2) {
            _tile_loadd(7, b + p.b_tile, p.b_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kDown == 2) {
            _tile_loadd(5, a + p.a_tile, p.a_row);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (kAcross == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, p.c, p.c_row);
    if constexpr (kAcross == 2) _tile_stored(1, p.c + 64, p.c_row);
    if constexpr (kDown == 2) _tile_stored(2, c1, p.c_row);
    if constexpr (kDown == 2 && kAcross == 2) _tile_stored(3, c1 + 64, p.c_row);
}

// c (+)= a b: `down` by kAcross tiles. `meanwhile` is called for every two of them down.
template <int kAcross, class F>
void tiled_product(TileProduct p, int64_t down, bool accumulate, const F& meanwhile) {
    settle_memory();
    for (int64_t i = 0; i < down; i += 2, p.a += 2 * p.a_tile, p.c += 32 * p.c_row) {
        TileProduct q = p;
        meanwhile();
        for (int j = 0; j < kAcross; j += 2, q.b += 2 * q.b_tile, q.c += 128) {
            if (down - i >= 2 && kAcross - j >= 2) tile_product<2, 2>(q, accumulate);
            else if (down - i >= 2) tile_product<2, 1>(q, accumulate);
            else if (kAcross - j >= 2) tile_product<1, 2>(q, accumulate);
            else tile_product<1, 1>(q, accumulate);
        }
    }
    settle_memory();
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
