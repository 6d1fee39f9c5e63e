/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs with the metadata of libxdp (xdp/xdp_helpers.h), good and bad. */
#include "test.h"

#define XDP_RUN_CONFIG(f) _##f SEC(".xdp_run_config")

#define PROGRAM(name)                     \
	SEC("xdp") int name(struct xdp_md *ctx) \
	{                                       \
		(void)ctx;                      \
		return XDP_PASS;                \
	}

struct {
	__uint(priority, 10);
	__uint(XDP_PASS, 0);
	__uint(XDP_DROP, 1);
} XDP_RUN_CONFIG(ldt_drop_only);
PROGRAM(ldt_drop_only)

struct {
	__uint(priority, 5);
} XDP_RUN_CONFIG(ldt_prio_only);
PROGRAM(ldt_prio_only)

struct {
	__uint(XDP_DROP, 1);
	__uint(XDP_TX, 1);
} XDP_RUN_CONFIG(ldt_more);
PROGRAM(ldt_more)

struct {
	__uint(XDP_PASS, 0);
} XDP_RUN_CONFIG(ldt_never);
PROGRAM(ldt_never)

struct {
	__uint(priority, 0);
} XDP_RUN_CONFIG(ldt_zero);
PROGRAM(ldt_zero)

PROGRAM(ldt_none)

struct {
	__uint(priority, 65536);
} XDP_RUN_CONFIG(ldt_too_late);
PROGRAM(ldt_too_late)

struct {
	__uint(XDP_PASS, 2);
} XDP_RUN_CONFIG(ldt_two);
PROGRAM(ldt_two)

struct {
	__uint(XDP_BOUNCE, 1);
} XDP_RUN_CONFIG(ldt_unknown);
PROGRAM(ldt_unknown)

struct {
	int priority;
} XDP_RUN_CONFIG(ldt_plain_int);
PROGRAM(ldt_plain_int)

int XDP_RUN_CONFIG(ldt_no_struct);
PROGRAM(ldt_no_struct)
