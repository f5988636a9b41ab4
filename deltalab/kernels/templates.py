"""The C around an edit's own statements: types, roundings, sums, loops over entries and files.

`PRELUDE` begins a program. `TOTAL` is a stage that takes a sum over the tensor, `COLUMN` one over
each column, `EDIT` the last one, `COUNTED` the same with terms that are added up on the way; in
both `ROW` is a sum over each row, and a tensor without such is one row. `RUN` is called from
outside, for a stage in memory or in files.
"""

PRELUDE = """
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { uint16_t bits; } bfloat16;
typedef struct { uint16_t bits; } float16;

static inline int32_t bits_of_float(float x) { int32_t y; memcpy(&y, &x, 4); return y; }
static inline float float_of_bits(int32_t x) { float y; memcpy(&y, &x, 4); return y; }

static inline float from_bfloat16(bfloat16 x) { return float_of_bits((uint32_t)x.bits << 16); }

static inline bfloat16 to_bfloat16(float x)  /* to the nearest, ties to even */
{
    uint32_t word = bits_of_float(x);
    uint16_t near = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    return (bfloat16){x != x ? 0x7FC0 : near};
}

static inline float from_float16(float16 x)
{
    uint32_t word = (uint32_t)(x.bits & 0x7FFF) << 13, sign = (uint32_t)(x.bits & 0x8000) << 16;
    uint32_t finite = bits_of_float(float_of_bits(word) * 0x1p112f);  /* denormal numbers too */
    return float_of_bits(sign | (word < 0x0F800000 ? finite : word | 0x7F800000));
}

static inline float16 to_float16(float x)  /* to the nearest, ties to even */
{
    uint32_t word = bits_of_float(x) & 0x7FFFFFFF, sign = (bits_of_float(x) >> 16) & 0x8000;
    uint32_t normal = (word + 0xFFF + (word >> 13 & 1) - 0x38000000) >> 13;
    uint32_t small = bits_of_float(float_of_bits(word) + 0.5f) - 0x3F000000;  /* units of 2^-24 */
    uint32_t finite = word < 0x38800000 ? small : normal < 0x7C00 ? normal : 0x7C00;
    return (float16){sign | (word > 0x7F800000 ? 0x7E00 : finite)};
}

/* A call, since compilers take (float)(int)x for a rounding, which would keep the sign of zero. */
static __attribute__((noinline)) int64_t whole_of(double x) { return (int64_t)x; }

static double added(const double *x, int64_t count)  /* eight by eight, in a fixed order */
{
    double lane[8] = {0};
    for (int64_t i = 0; i < count; i += 8)
        for (int64_t j = 0; j < 8; j++)
            lane[j] += x[i + j];
    for (int64_t half = 4; half; half /= 2)
        for (int64_t j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

#ifdef __FMA__
#define ADDED(x, sum) __builtin_fmaf(x, x, sum)
#else
#define ADDED(x, sum) ((x) * (x) + (sum))
#endif
enum { BLOCK = 512, LANES = 16, AHEAD = 2048 };
/* Ask for the memory of a later block, which the processor does not foresee by itself where a page
   ends or where entries take long: a prefetch past the end does nothing. */
#define FETCH(at)                                                                   \\
    do {                                                                            \\
        for (int64_t i = (at); i < (at) + BLOCK; i += 64 / (int64_t)sizeof *pre)    \\
            __builtin_prefetch(pre + i);                                            \\
        for (int64_t i = (at); i < (at) + BLOCK; i += 64 / (int64_t)sizeof *post)   \\
            __builtin_prefetch(post + i), __builtin_prefetch(out + i, 1);           \\
    } while (0)
/* Add the squares of a block, which zeros fill up, to lanes of doubles. Conversion and addition of
   doubles take most of the time: 32 squares a lane are added as floats first, to 5e-7 of their
   sum, unless they leave the range in which that holds. */
static void squares(const float *restrict x, double *restrict lane)
{
    float sum[4 * LANES] = {0}, half[LANES];
    for (int64_t i = 0; i < BLOCK; i += 4 * LANES)
        for (int64_t j = 0; j < 4 * LANES; j++)
            sum[j] = ADDED(x[i + j], sum[j]);
    for (int64_t j = 0; j < LANES; j++)
        half[j] = sum[j] = (sum[j] + sum[j + LANES]) + (sum[j + 2 * LANES] + sum[j + 3 * LANES]);
    for (int64_t more = LANES / 2; more; more /= 2)
        for (int64_t j = 0; j < more; j++)
            half[j] += half[j + more];
    if (half[0] > 0x1p-80f && half[0] < 0x1p120f) {
        for (int64_t j = 0; j < LANES; j++)
            lane[j] += sum[j];
        return;
    }
    int32_t any = 0;
    for (int64_t i = 0; i < BLOCK; i++)
        any |= bits_of_float(x[i]) & 0x7FFFFFFF;
    for (int64_t i = 0; any && i < BLOCK; i += LANES)
        for (int64_t j = 0; j < LANES; j++)
            lane[j] += (double)x[i + j] * x[i + j];
}

/* Of entries that are held, and gaps of others before them: `spread` counts short gaps by length,
   and leaves in `to` how many gaps there are, sums of floor(g / M) over long ones for M = 2^w - 1,
   w from 1 to 8, the first gap, and how many others follow the last. */
enum { SHORT = 256, SPREAD = 11 };
static void spread(const int8_t *restrict x, int64_t count, int64_t *restrict gaps,
                   double *restrict to)
{
    int64_t since = to[10], held = to[0];
    for (int64_t i = 0; i < count; i += 64) {
        uint64_t mask = 0, eight, done = 0;
        for (int64_t j = 0; j < 64; j += 8) {
            memcpy(&eight, x + i + j, 8);
            mask |= (eight * 0x0102040810204080 >> 56) << j;
        }
        while (mask) {
            int64_t at = __builtin_ctzll(mask), gap = since + at - done;
            mask &= mask - 1, since = 0, done = at + 1;
            if (held++ == 0)
                to[9] = gap;
            else if (gap < SHORT)
                gaps[gap + SHORT * (held & 3)]++;
            else
                for (int64_t w = 1; w <= 8; w++)
                    to[w] += gap / ((1 << w) - 1);
        }
        since += (count - i < 64 ? count - i : 64) - done;
    }
    to[0] = held, to[10] = since;
}

static void spread_short(const int64_t *restrict gaps, double *restrict to)
{
    for (int64_t gap = 1; gap < SHORT; gap++) {
        int64_t each = 0;
        for (int64_t j = 0; j < 4; j++)
            each += gaps[gap + SHORT * j];
        for (int64_t w = 1; w <= 8; w++)
            to[w] += each * (gap / ((1 << w) - 1));
    }
}
"""
TOTAL = """
static double stage_{stage}({signature})
{{
    double block[1024], sum = 0;
{scalars}
    for (int64_t start = 0; start < count; start += 1024) {{
        int64_t size = count - start < 1024 ? count - start : 1024;
        for (int64_t j = 0; j < size; j++) {{
            int64_t i = start + j;
{entries}
            block[j] = {result};
        }}
        for (int64_t j = size; j % 8; j++)
            block[j] = 0;
        sum += added(block, size);
    }}
    return sum;
}}
"""
COLUMN = """
static double stage_{stage}({signature})
{{
{scalars}
    for (int64_t first = 0; first < count; first += width)
        for (int64_t i = first; i < first + width; i++) {{
{entries}
            terms[i - first] += {result};
        }}
    return 0;
}}
"""
ROW = """
        double t{total} = 0;
        for (int64_t start = first; start < first + width; start += 1024) {{
            int64_t size = first + width - start < 1024 ? first + width - start : 1024;
            double block[1024];
            for (int64_t j = 0; j < size; j++) {{
                int64_t i = start + j;
{entries}
                block[j] = {result};
            }}
            for (int64_t j = size; j % 8; j++)
                block[j] = 0;
            t{total} += added(block, size);
        }}
"""
EDIT = """
static double stage_{stage}({signature})
{{
{scalars}
    for (int64_t first = 0; first < count; first += width) {{
{rows}
        for (int64_t start = first; start < first + width; start += BLOCK) {{
            int64_t end = start + BLOCK < first + width ? start + BLOCK : first + width;
            FETCH(start + AHEAD);
            for (int64_t i = start; i < end; i++) {{
{entries}
                out[i] = {result};
            }}
        }}
    }}
    return 0;
}}
"""
COUNTED = """
static double stage_{stage}({signature})
{{
{blocks}
{scalars}
    for (int64_t first = 0; first < count; first += width) {{
{rows}
        for (int64_t start = first; start < first + width; start += BLOCK) {{
            int64_t size = first + width - start < BLOCK ? first + width - start : BLOCK;
            FETCH(start + AHEAD);
{counts}
            for (int64_t j = 0; j < size; j++) {{
                int64_t i = start + j;
{entries}
                out[i] = {result};
{terms}
            }}
            for (int64_t j = size; j < BLOCK; j++) {{
{filled}
            }}
            for (int64_t j = size; j % 64; j++) {{
{cleared}
            }}
{added}
        }}
    }}
{totals}
    return 0;
}}
"""
RUN = """
/* Entries that stay in the cache, in whole rows where there are rows. */
static int64_t block_of(int64_t width)
{{
    int64_t most = 1 << 16;
    return width < 1 ? most : width > most ? width : most / width * width;
}}

static double (*const stages[])({signature}) = {{ {stages} }};

double in_memory(int64_t stage, int64_t count, const {pre} *pre, const {post} *post,
                 const {grad} *grad, {post} *out, const int32_t *keys, const double *numbers,
                 const double *sums, int64_t whole, double *terms, int64_t width)
{{
    double sum = 0;
    int64_t block = block_of(width);
    for (int64_t at = 0; at < count; at += block) {{
        int64_t size = count - at < block ? count - at : block;
        sum += stages[stage](at, size, pre + at, post + at, grad ? grad + at : 0, out + at, keys,
                             numbers, sums, whole, terms, width ? width : size);
    }}
    return sum;
}}

static bool take(int file, void *into, int64_t size, int64_t at)
{{
    for (char *to = into; size > 0;) {{
        ssize_t count = pread(file, to, size, at);
        if (count <= 0)
            return false;
        to += count, at += count, size -= count;
    }}
    return true;
}}

static bool put(int file, const void *from, int64_t size, int64_t at)
{{
    for (const char *rest = from; size > 0;) {{
        ssize_t count = pwrite(file, rest, size, at);
        if (count <= 0)
            return false;
        rest += count, at += count, size -= count;
    }}
    return true;
}}

static bool pre_finite(const {pre} *x, int64_t size)
{{
    int32_t infinite = 0;
    for (int64_t i = 0; i < size; i++)
        infinite += {infinite_pre};
    return !infinite;
}}

static bool post_finite(const {post} *x, int64_t size)
{{
    int32_t infinite = 0;
    for (int64_t i = 0; i < size; i++)
        infinite += {infinite_post};
    return !infinite;
}}

/* The same block by block from two files, and to a third at the last stage; else NaN. */
double in_files(int64_t stage, int64_t count, int pre, int64_t pre_at, int post, int64_t post_at,
                int out, int64_t out_at, const int32_t *keys, const double *numbers,
                const double *sums, int64_t whole, int64_t width)
{{
    int64_t block = block_of(width);
    {pre} *a = malloc(block * sizeof *a);
    {post} *b = malloc(block * sizeof *b), *c = malloc(block * sizeof *c);
    bool fine = a && b && c;
    double sum = 0;
    for (int64_t at = 0; fine && at < count; at += block) {{
        int64_t size = count - at < block ? count - at : block;
        fine = take(pre, a, size * sizeof *a, pre_at + at * sizeof *a) &&
               take(post, b, size * sizeof *b, post_at + at * sizeof *b) &&
               pre_finite(a, size) && post_finite(b, size);
        if (fine)
            sum += stages[stage](at, size, a, b, 0, c, keys, numbers, sums, whole, 0,
                                 width ? width : size);
        if (fine && stage == {totals})
            fine = post_finite(c, size) && put(out, c, size * sizeof *c, out_at + at * sizeof *c);
    }}
    free(a), free(b), free(c);
    return fine ? sum : NAN;
}}
"""
