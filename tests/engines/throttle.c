/* A disk that gives and takes THROTTLE_BYTES_PER_S and no more, for one process: what it reads and writes past the page cache waits
 * for its turn. Preloaded; sees plain system calls only (KVKEEP_NO_IO_URING).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t free_at;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Returns when the disk has had time for so many bytes more. One queue for both directions, as on a device. */
static void turn(int fd, size_t bytes) {
  static int64_t rate;
  if (!(fcntl(fd, F_GETFL) & O_DIRECT)) return;
  pthread_mutex_lock(&lock);
  if (!rate) rate = atoll(getenv("THROTTLE_BYTES_PER_S"));
  int64_t at = now();
  if (free_at > at) at = free_at;
  free_at = at + (int64_t)(bytes * 1e9 / rate);
  struct timespec until = {free_at / 1000000000LL, free_at % 1000000000LL};
  pthread_mutex_unlock(&lock);
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)) {}
}

static size_t length(const struct iovec *parts, int count) {
  size_t n = 0;
  for (int i = 0; i < count; i++) n += parts[i].iov_len;
  return n;
}

ssize_t pread64(int fd, void *data, size_t bytes, off_t at) {
  turn(fd, bytes);
  return syscall(SYS_pread64, fd, data, bytes, at);
}
ssize_t pread(int fd, void *data, size_t bytes, off_t at) { return pread64(fd, data, bytes, at); }
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) {
  turn(fd, length(parts, count));
  return syscall(SYS_preadv, fd, parts, count, at, 0);
}
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) { return preadv64(fd, parts, count, at); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  turn(fd, length(parts, count));
  return syscall(SYS_preadv2, fd, parts, count, at, 0, flags);
}
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  return preadv64v2(fd, parts, count, at, flags);
}
ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t at) {
  turn(fd, bytes);
  return syscall(SYS_pwrite64, fd, data, bytes, at);
}
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) { return pwrite64(fd, data, bytes, at); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at) {
  turn(fd, length(parts, count));
  return syscall(SYS_pwritev, fd, parts, count, at, 0);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) { return pwritev64(fd, parts, count, at); }
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  turn(fd, length(parts, count));
  return syscall(SYS_pwritev2, fd, parts, count, at, 0, flags);
}
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  return pwritev64v2(fd, parts, count, at, flags);
}
