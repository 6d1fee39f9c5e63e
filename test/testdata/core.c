// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Reads fields that no kernel has.
#include "test.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct sk_buff {
	struct {
		int none;
	} ldt[2];
};
struct ldt_none {
	int field;
};
#pragma clang attribute pop

SEC("xdp") int ldt_core(struct xdp_md *ctx)
{
	return (long)&((struct sk_buff *)ctx)->ldt[1].none + (long)&((struct ldt_none *)ctx)->field;
}
