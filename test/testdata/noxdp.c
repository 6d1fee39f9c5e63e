/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Not an XDP program in it. */
#include "test.h"

SEC("tc")
int ldt_tc(void *skb)
{
	(void)skb;
	return 0;
}
