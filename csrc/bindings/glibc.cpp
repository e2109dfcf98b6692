// SPDX-License-Identifier: Apache-2.0
// The library runs with glibc 2.28, wherever it is built: functions that a newer glibc has in a newer version are taken
// in their old one, which returns the same bits. The linker sends calls of exp, log and pow here (--wrap).
#if defined(__x86_64__)
#define FASTASR_OLDEST "GLIBC_2.2.5"
#else
#define FASTASR_OLDEST "GLIBC_2.17"
#endif

extern "C" {
double fastasr_exp(double);
double fastasr_log(double);
double fastasr_pow(double, double);
__asm__(".symver fastasr_exp,exp@" FASTASR_OLDEST);
__asm__(".symver fastasr_log,log@" FASTASR_OLDEST);
__asm__(".symver fastasr_pow,pow@" FASTASR_OLDEST);
double __wrap_exp(double x) { return fastasr_exp(x); }
double __wrap_log(double x) { return fastasr_log(x); }
double __wrap_pow(double x, double y) { return fastasr_pow(x, y); }

// glibc 2.32 sets it while a process has one thread; std::shared_ptr then counts without atomics. Ours never says so.
char __libc_single_threaded = 0;
}
