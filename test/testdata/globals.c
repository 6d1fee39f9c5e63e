/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ldt_globals has a global of every type that can be given as text, and some that cannot. */
#include "test.h"

typedef __u16 port_t;

enum colour { RED, GREEN = 7, BLUE = -3 };
enum wide { NARROW, WIDE = 0x123456789abcULL };

volatile const signed char s8 = 1;
volatile const __u8 u8 = 1;
volatile const short s16 = 1;
volatile const port_t u16 = 1;
volatile const int s32 = 1;
volatile const __u32 u32 = 1;
volatile const long long s64 = 1;
volatile const __u64 u64 = 1;
volatile const __int128 s128 = 1;
volatile const bool flag = 1;
volatile const char letter = 'a';
volatile const enum colour colour = GREEN;
volatile const enum wide wide = WIDE;
volatile const char label[8] = "old";
volatile const int numbers[2] = { 1, 2 };
volatile const struct { int x, y; } point = { 1, 2 };
volatile const int *volatile const pointer;
__u32 variable = 1;
__u32 zeroed;

SEC("xdp")
int ldt_globals(struct xdp_md *ctx)
{
	__u64 sum = s8 + u8 + s16 + u16 + s32 + u32 + s64 + u64 + (__u64)s128 + flag + letter + colour + wide;

	(void)ctx;
	sum += label[0] + numbers[0] + point.x + (pointer != NULL);
	zeroed = sum + variable;
	return XDP_PASS;
}
