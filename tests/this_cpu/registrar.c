/* A library that registers an rseq area of its own before the program's constructors run: one for the main thread, as
 * libraries did before libc came to do it. For `homes.rs`. */

#include <linux/rseq.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread struct rseq area __attribute__((aligned(32)));

int registrar_result = 1;

__attribute__((constructor)) static void register_area(void)
{
	registrar_result = (int)syscall(__NR_rseq, &area, sizeof(struct rseq) > 32 ? 32 : sizeof(struct rseq), 0, 0x53053053);
}
