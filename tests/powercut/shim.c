/* The power-cut shim: what a device without power loss protection would still hold.
 *
 * Loaded into a process with LD_PRELOAD, it lets every change of files below $KVKEEP_POWERCUT_DIR through and writes beside
 * each how to undo it, to $KVKEEP_POWERCUT_LOG. A flush (fsync, fdatasync) of a file or folder is noted with the number of
 * the last change it covers. After the process was killed, `kvkeep_tests::powercut` reads the log and takes back a seeded
 * part of what no flush covered: the disk is then as after a power cut at that moment.
 *
 *   $KVKEEP_POWERCUT_DIR           the folder that is watched, an absolute path without symlinks
 *   $KVKEEP_POWERCUT_LOG           the log; `<log>.graves/` keeps removed files (hard links), so both are on one file system
 *   $KVKEEP_POWERCUT_IGNORE_FSYNC  paths, separated by `:`; a flush of a file whose path contains one (ends with one, if it
 *                                  ends with `$`; both of two, with `*` between them) succeeds and covers nothing: a device
 *                                  that lies
 *   $KVKEEP_POWERCUT_FLUSH_US      how long a flush takes, microseconds
 *   $KVKEEP_POWERCUT_FAIL          a part of a path; while a file `<log>.fail-read`, `<log>.fail-write` or `<log>.fail-flush`
 *                                  exists, that of a watched file with such a path ends with EIO
 *
 * A record of the log is 64 bytes, little-endian, and `data bytes` of data:
 *
 *   | at | size | field                                                             |
 *   |----|------|-------------------------------------------------------------------|
 *   |  0 |  4   | magic `PCUT`                                                      |
 *   |  4 |  4   | kind                                                              |
 *   |  8 |  8   | number: 1, 2, 3 ...                                               |
 *   | 16 |  8   | inode of the file; of the folder where a name changes             |
 *   | 24 |  8   | offset of the change; of a flush: the last number it covers       |
 *   | 32 |  8   | bytes that change                                                 |
 *   | 40 |  8   | size of the file before                                           |
 *   | 48 |  8   | size of the file after                                            |
 *   | 56 |  8   | data bytes                                                        |
 *   | 64 |  n   | bytes of before (fewer than change: zeros follow); names, each with a 0 behind it |
 *
 * A change is noted before it is made, both under one lock: the log knows every change, in order. What cannot be undone
 * (a shared writable mapping) is noted as `unsupported`, and the replay refuses it. Real calls are made with syscall(2):
 * what the shim does itself is not seen by the shim.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind {
  WRITE = 1,
  TRUNCATE = 2,
  SYNC = 3,
  CREATE = 4,
  UNLINK = 5,
  RENAME = 6,
  MKDIR = 7,
  RMDIR = 8,
  DIRSYNC = 9,
  UNSUPPORTED = 10,
};

struct record {
  char magic[4];
  uint32_t kind;
  uint64_t number, inode, offset, bytes, old_size, new_size, data_bytes;
};

/* Bytes of before that one record holds at most; a longer change is several records. */
#define DATA_BYTES_MAX (1 << 20)
/* Inodes known at a time; a power of two. */
#define FILES_MAX (1 << 16)

struct file {
  uint64_t inode; /* 0: free */
  int watched;
  int reader; /* for the bytes of before; -1: not open */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char dir[PATH_MAX], graves[PATH_MAX - 32], ignored[PATH_MAX], failing[PATH_MAX], orders[PATH_MAX - 32];
static size_t dir_bytes;
static dev_t dir_device;
static int log_fd = -1;
static long flush_us;
static uint64_t last_number;
static struct file files[FILES_MAX];
static unsigned char before[DATA_BYTES_MAX];

static void die(const char *what) {
  dprintf(2, "powercut shim: %s: %s\n", what, strerror(errno));
  _exit(99);
}

static long real_open(const char *path, int flags, mode_t mode) {
  return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

__attribute__((constructor)) static void start(void) {
  const char *watched = getenv("KVKEEP_POWERCUT_DIR"), *log = getenv("KVKEEP_POWERCUT_LOG");
  if (!watched || !log) return;
  const char *liar = getenv("KVKEEP_POWERCUT_IGNORE_FSYNC"), *us = getenv("KVKEEP_POWERCUT_FLUSH_US");
  const char *broken = getenv("KVKEEP_POWERCUT_FAIL");
  struct stat st;
  if (!realpath(watched, dir) || stat(dir, &st)) die(watched);
  dir_bytes = strlen(dir);
  dir_device = st.st_dev;
  flush_us = us ? atol(us) : 0;
  snprintf(ignored, sizeof ignored, "%s", liar ? liar : "");
  snprintf(failing, sizeof failing, "%s", broken ? broken : "");
  snprintf(orders, sizeof orders, "%s.fail-", log);
  snprintf(graves, sizeof graves, "%s.graves", log);
  if (syscall(SYS_mkdirat, AT_FDCWD, graves, 0700) && errno != EEXIST) die(graves);
  log_fd = real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (log_fd < 0) die(log);
}

/* ---------------------------------------------------------------- the log */

static void note(enum kind kind, uint64_t inode, uint64_t offset, uint64_t bytes, uint64_t old_size, uint64_t new_size,
                 const void *data, size_t data_bytes) {
  struct record r = {{'P', 'C', 'U', 'T'}, kind, ++last_number, inode, offset, bytes, old_size, new_size, data_bytes};
  struct iovec parts[2] = {{&r, sizeof r}, {(void *)data, data_bytes}};
  size_t total = sizeof r + data_bytes, done = 0;
  while (done < total) {
    long n = syscall(SYS_writev, log_fd, parts, 2);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) die("the log");
    done += n;
    for (int i = 0; i < 2; i++) {
      size_t step = (size_t)n < parts[i].iov_len ? (size_t)n : parts[i].iov_len;
      parts[i].iov_base = (char *)parts[i].iov_base + step;
      parts[i].iov_len -= step;
      n -= step;
    }
  }
}

static void note_names(enum kind kind, uint64_t folder, const char *a, const char *b, const char *c) {
  char names[3 * PATH_MAX];
  size_t n = 0;
  const char *all[3] = {a, b, c};
  for (int i = 0; i < 3 && all[i]; i++) {
    size_t len = strlen(all[i]) + 1;
    memcpy(names + n, all[i], len);
    n += len;
  }
  note(kind, folder, 0, 0, 0, 0, names, n);
}

static void unsupported(const char *what) {
  note(UNSUPPORTED, 0, 0, 0, 0, 0, what, strlen(what) + 1);
}

/* ---------------------------------------------------------------- which files */

static int below(const char *path) {
  return !strncmp(path, dir, dir_bytes) && (path[dir_bytes] == '/' || !path[dir_bytes]);
}

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return 1;
}

static struct file *entry(uint64_t inode) {
  for (size_t i = inode * 0x9e3779b97f4a7c15u >> 48, probes = 0; probes < FILES_MAX; i++, probes++) {
    struct file *f = &files[i % FILES_MAX];
    if (f->inode == inode) return f;
    if (!f->inode) {
      f->inode = inode;
      f->watched = -1;
      f->reader = -1;
      return f;
    }
  }
  errno = ENFILE;
  die("too many files");
  return NULL;
}

/* The file behind a descriptor if it is watched; else NULL. */
static struct file *watched(int fd, struct stat *st) {
  if (log_fd < 0 || fd == log_fd || fstat(fd, st) || !S_ISREG(st->st_mode) || st->st_dev != dir_device) return NULL;
  struct file *f = entry(st->st_ino);
  if (f->watched < 0) {
    char path[PATH_MAX];
    f->watched = path_of(fd, path) && below(path);
  }
  return f->watched ? f : NULL;
}

/* A path as it stands in the log; 0 if it is not watched. */
static int absolute(int at, const char *path, char *out) {
  if (log_fd < 0 || !path) return 0;
  char raw[2 * PATH_MAX], base[PATH_MAX];
  if (path[0] == '/') {
    snprintf(raw, sizeof raw, "%s", path);
  } else {
    if (at == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(at, base)) return 0;
    snprintf(raw, sizeof raw, "%s/%s", base, path);
  }
  size_t n = 0;
  for (const char *p = raw; *p && n < PATH_MAX - 1; p++) {
    if (*p == '/' && n && out[n - 1] == '/') continue;
    out[n++] = *p;
  }
  while (n > 1 && out[n - 1] == '/') n--;
  out[n] = 0;
  return below(out);
}

/* Whether this kind of call on this descriptor is to fail now. */
static int fails(int fd, const char *call) {
  char path[PATH_MAX];
  struct stat st;
  int saved = errno, yes = 0;
  if (failing[0] && log_fd >= 0 && !fstat(fd, &st) && st.st_dev == dir_device) {
    snprintf(path, sizeof path, "%s%s", orders, call);
    yes = !access(path, F_OK) && path_of(fd, path) && below(path) && strstr(path, failing);
  }
  errno = yes ? EIO : saved;
  return yes;
}

static uint64_t folder_of(const char *path) {
  char folder[PATH_MAX];
  struct stat st;
  snprintf(folder, sizeof folder, "%s", path);
  char *slash = strrchr(folder, '/');
  if (!slash) return 0;
  *slash = 0;
  return stat(folder, &st) ? 0 : st.st_ino;
}

/* Keeps what is about to lose its name; answers where. */
static void bury(const char *path, char *grave) {
  snprintf(grave, PATH_MAX, "%s/%llu", graves, (unsigned long long)last_number + 1);
  if (syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, grave, 0)) grave[0] = 0;
}

/* ---------------------------------------------------------------- changes of bytes */

/* Notes that [offset, offset + bytes) changes and the file then has new_size bytes. */
static void note_change(struct file *f, int fd, enum kind kind, uint64_t offset, uint64_t bytes, uint64_t old_size,
                        uint64_t new_size) {
  if (f->reader < 0 && fd >= 0) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    f->reader = real_open(link, O_RDONLY | O_CLOEXEC, 0);
    if (f->reader < 0) die("cannot read what is about to change");
  }
  uint64_t end = offset + bytes, at = offset;
  do {
    uint64_t step = end - at < DATA_BYTES_MAX ? end - at : DATA_BYTES_MAX;
    uint64_t there = at < old_size ? (old_size - at < step ? old_size - at : step) : 0;
    size_t got = 0;
    while (got < there) {
      long n = syscall(SYS_pread64, f->reader, before + got, there - got, at + got);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) die("cannot read what is about to change");
      if (!n) break;
      got += n;
    }
    while (got && !before[got - 1]) got--; /* zeros at the end are implied */
    /* The size changes with the last piece. */
    uint64_t size = at + step == end ? new_size : old_size;
    note(kind, f->inode, at, step, old_size, size, before, got);
    at += step;
  } while (at < end);
}

static uint64_t length(const struct iovec *parts, int count) {
  uint64_t n = 0;
  for (int i = 0; i < count; i++) n += parts[i].iov_len;
  return n;
}

/* Every write ends here. offset -1: where the descriptor stands. */
static ssize_t change(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  struct stat st;
  if (fails(fd, "write")) return -1;
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct file *f = watched(fd, &st);
  uint64_t bytes = f ? length(parts, count) : 0;
  if (!f || !bytes) {
    pthread_mutex_unlock(&lock);
    errno = saved;
    if (offset < 0) return syscall(SYS_writev, fd, parts, count);
    return syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags);
  }
  int mode = fcntl(fd, F_GETFL);
  off_t at = offset;
  if (mode & O_APPEND) at = st.st_size;
  else if (at < 0) at = lseek(fd, 0, SEEK_CUR);
  uint64_t size = st.st_size, end = at + bytes;
  if ((mode & O_ACCMODE) != O_RDONLY) note_change(f, fd, WRITE, at, bytes, size, end > size ? end : size);
  errno = saved;
  ssize_t n = offset < 0 ? syscall(SYS_writev, fd, parts, count)
                         : syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags);
  if (n > 0 && ((mode & (O_SYNC | O_DSYNC)) || flags & (RWF_SYNC | RWF_DSYNC))) {
    saved = errno;
    note(SYNC, f->inode, last_number, 0, 0, 0, NULL, 0);
    errno = saved;
  }
  pthread_mutex_unlock(&lock);
  return n;
}

ssize_t write(int fd, const void *data, size_t bytes) {
  struct iovec part = {(void *)data, bytes};
  return change(fd, &part, 1, -1, 0);
}
ssize_t writev(int fd, const struct iovec *parts, int count) { return change(fd, parts, count, -1, 0); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
  struct iovec part = {(void *)data, bytes};
  return change(fd, &part, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t offset) { return pwrite(fd, data, bytes, offset); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return change(fd, parts, count, offset, 0); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) { return change(fd, parts, count, offset, 0); }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  return change(fd, parts, count, offset, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  return change(fd, parts, count, offset, flags);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t offset) {
  return fails(fd, "read") ? -1 : syscall(SYS_pread64, fd, data, bytes, offset);
}
ssize_t pread64(int fd, void *data, size_t bytes, off_t offset) { return pread(fd, data, bytes, offset); }

int ftruncate(int fd, off_t size) {
  struct stat st;
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct file *f = watched(fd, &st);
  if (f && size < st.st_size) note_change(f, fd, TRUNCATE, size, st.st_size - size, st.st_size, size);
  if (f && size > st.st_size) note_change(f, fd, WRITE, st.st_size, 0, st.st_size, size);
  errno = saved;
  int r = syscall(SYS_ftruncate, fd, size);
  pthread_mutex_unlock(&lock);
  return r;
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

int fallocate(int fd, int mode, off_t offset, off_t bytes) {
  struct stat st;
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct file *f = watched(fd, &st);
  if (f) {
    uint64_t size = st.st_size, end = offset + bytes, grown = end > size && !(mode & FALLOC_FL_KEEP_SIZE) ? end : size;
    if (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)) unsupported("fallocate that moves bytes");
    else if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) note_change(f, fd, WRITE, offset, bytes, size, grown);
    else if (grown > size) note_change(f, fd, WRITE, size, 0, size, grown);
  }
  errno = saved;
  int r = syscall(SYS_fallocate, fd, mode, offset, bytes);
  pthread_mutex_unlock(&lock);
  return r;
}
int fallocate64(int fd, int mode, off_t offset, off_t bytes) { return fallocate(fd, mode, offset, bytes); }
int posix_fallocate(int fd, off_t offset, off_t bytes) {
  int saved = errno, r = fallocate(fd, 0, offset, bytes) ? errno : 0;
  errno = saved;
  return r;
}
int posix_fallocate64(int fd, off_t offset, off_t bytes) { return posix_fallocate(fd, offset, bytes); }

/* Callers fall back to read and write. */
ssize_t copy_file_range(int in, off_t *in_at, int out, off_t *out_at, size_t bytes, unsigned flags) {
  struct stat st;
  pthread_mutex_lock(&lock);
  struct file *f = watched(out, &st);
  pthread_mutex_unlock(&lock);
  if (!f) return syscall(SYS_copy_file_range, in, in_at, out, out_at, bytes, flags);
  errno = ENOSYS;
  return -1;
}
ssize_t sendfile(int out, int in, off_t *at, size_t bytes) {
  struct stat st;
  pthread_mutex_lock(&lock);
  struct file *f = watched(out, &st);
  pthread_mutex_unlock(&lock);
  if (!f) return syscall(SYS_sendfile, out, in, at, bytes);
  errno = EINVAL;
  return -1;
}
ssize_t sendfile64(int out, int in, off_t *at, size_t bytes) { return sendfile(out, in, at, bytes); }

void *mmap(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset) {
  if (fd >= 0 && (prot & PROT_WRITE) && !(flags & MAP_PRIVATE)) {
    struct stat st;
    pthread_mutex_lock(&lock);
    if (watched(fd, &st)) unsupported("a shared writable mapping");
    pthread_mutex_unlock(&lock);
  }
  return (void *)syscall(SYS_mmap, addr, bytes, prot, flags, fd, offset);
}
void *mmap64(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset) {
  return mmap(addr, bytes, prot, flags, fd, offset);
}

/* ---------------------------------------------------------------- flushes */

static int fits(const char *path, char *one) {
  char *second = strchr(one, '*');
  if (second) {
    *second = 0;
    return fits(path, one) && fits(path, second + 1);
  }
  size_t n = strlen(one), len = strlen(path);
  if (!n) return 0;
  if (one[n - 1] != '$') return strstr(path, one) != NULL;
  return len >= n - 1 && !strncmp(path + len - (n - 1), one, n - 1);
}

static int lies(const char *path) {
  char all[PATH_MAX], *rest = all;
  snprintf(all, sizeof all, "%s", ignored);
  for (char *one; (one = strsep(&rest, ":"));) {
    if (fits(path, one)) return 1;
  }
  return 0;
}

static int flush(int fd, long call) {
  struct stat st;
  if (fails(fd, "flush")) return -1;
  char path[PATH_MAX];
  int saved = errno;
  pthread_mutex_lock(&lock);
  uint64_t covered = last_number;
  int folder = log_fd >= 0 && !fstat(fd, &st) && S_ISDIR(st.st_mode) && st.st_dev == dir_device && path_of(fd, path) && below(path);
  int known = folder || (watched(fd, &st) && path_of(fd, path));
  pthread_mutex_unlock(&lock);
  errno = saved;
  if (!known) return syscall(call, fd);
  /* Nothing needs to reach the real disk: the cut is played, and the page cache outlives the process. */
  if (flush_us > 0) {
    struct timespec t = {flush_us / 1000000, flush_us % 1000000 * 1000};
    nanosleep(&t, NULL);
  }
  if (!lies(path)) {
    pthread_mutex_lock(&lock);
    note(folder ? DIRSYNC : SYNC, st.st_ino, covered, 0, 0, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
  }
  errno = saved;
  return 0;
}

int fsync(int fd) { return flush(fd, SYS_fsync); }
int fdatasync(int fd) { return flush(fd, SYS_fdatasync); }
/* Starts writing out and promises nothing. */
int sync_file_range(int fd, off_t offset, off_t bytes, unsigned flags) {
  return syscall(SYS_sync_file_range, fd, offset, bytes, flags);
}

/* ---------------------------------------------------------------- changes of names */

static int open_at(int at, const char *path, int flags, mode_t mode) {
  char name[PATH_MAX];
  if (!(flags & (O_CREAT | O_TRUNC)) || !absolute(at, path, name)) return syscall(SYS_openat, at, path, flags, mode);
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct stat st;
  int there = !lstat(name, &st), made = !there && flags & O_CREAT;
  if ((flags & O_TMPFILE) == O_TMPFILE) unsupported("O_TMPFILE");
  if (made) note_names(CREATE, folder_of(name), name, NULL, NULL);
  if (there && flags & O_TRUNC && S_ISREG(st.st_mode) && st.st_size > 0 && !(flags & O_EXCL && flags & O_CREAT)) {
    int reader = real_open(name, O_RDONLY | O_CLOEXEC, 0);
    struct file *f = entry(st.st_ino);
    f->watched = 1;
    if (reader >= 0) note_change(f, reader, TRUNCATE, 0, st.st_size, st.st_size, 0);
    if (reader >= 0) syscall(SYS_close, reader);
  }
  errno = saved;
  int fd = syscall(SYS_openat, at, path, flags, mode);
  saved = errno;
  if (fd >= 0 && made && !fstat(fd, &st)) {
    struct file *f = entry(st.st_ino); /* the number may have belonged to a file that is gone */
    if (f->reader >= 0) syscall(SYS_close, f->reader);
    f->reader = -1;
    f->watched = 1;
  }
  pthread_mutex_unlock(&lock);
  errno = saved;
  return fd;
}

#define MODE(flags, last)                                             \
  mode_t mode = 0;                                                    \
  if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {      \
    va_list more;                                                     \
    va_start(more, last);                                             \
    mode = va_arg(more, mode_t);                                      \
    va_end(more);                                                     \
  }

int open(const char *path, int flags, ...) {
  MODE(flags, flags)
  return open_at(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags, flags)
  return open_at(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int at, const char *path, int flags, ...) {
  MODE(flags, flags)
  return open_at(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
  MODE(flags, flags)
  return open_at(at, path, flags | O_LARGEFILE, mode);
}
int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags | O_LARGEFILE, 0); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int unlinkat(int at, const char *path, int flags) {
  char name[PATH_MAX], grave[PATH_MAX];
  if (!absolute(at, path, name)) return syscall(SYS_unlinkat, at, path, flags);
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct stat st;
  if (!lstat(name, &st)) {
    if (flags & AT_REMOVEDIR) {
      note_names(RMDIR, folder_of(name), name, NULL, NULL);
    } else if (!S_ISDIR(st.st_mode)) {
      bury(name, grave);
      note_names(UNLINK, folder_of(name), name, grave, NULL);
    }
  }
  errno = saved;
  int r = syscall(SYS_unlinkat, at, path, flags);
  pthread_mutex_unlock(&lock);
  return r;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
  struct stat st;
  return unlinkat(AT_FDCWD, path, !lstat(path, &st) && S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
}

int renameat2(int at_from, const char *from, int at_to, const char *to, unsigned flags) {
  char a[PATH_MAX], b[PATH_MAX], grave[PATH_MAX] = "";
  int seen_a = absolute(at_from, from, a), seen_b = absolute(at_to, to, b);
  if (!seen_a && !seen_b) return syscall(SYS_renameat2, at_from, from, at_to, to, flags);
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct stat st;
  if (seen_a != seen_b || flags || folder_of(a) != folder_of(b)) {
    unsupported("a rename between folders, or with flags");
  } else if (!lstat(a, &st)) {
    if (!lstat(b, &st)) bury(b, grave);
    note_names(RENAME, folder_of(b), a, b, grave);
  }
  errno = saved;
  int r = syscall(SYS_renameat2, at_from, from, at_to, to, flags);
  pthread_mutex_unlock(&lock);
  return r;
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int at_from, const char *from, int at_to, const char *to) { return renameat2(at_from, from, at_to, to, 0); }

int mkdirat(int at, const char *path, mode_t mode) {
  char name[PATH_MAX];
  if (!absolute(at, path, name)) return syscall(SYS_mkdirat, at, path, mode);
  pthread_mutex_lock(&lock);
  int saved = errno;
  struct stat st;
  if (lstat(name, &st)) note_names(MKDIR, folder_of(name), name, NULL, NULL);
  errno = saved;
  int r = syscall(SYS_mkdirat, at, path, mode);
  pthread_mutex_unlock(&lock);
  return r;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int at_from, const char *from, int at_to, const char *to, int flags) {
  char name[PATH_MAX];
  if (absolute(at_to, to, name)) {
    pthread_mutex_lock(&lock);
    int saved = errno;
    note_names(CREATE, folder_of(name), name, NULL, NULL);
    errno = saved;
    pthread_mutex_unlock(&lock);
  }
  return syscall(SYS_linkat, at_from, from, at_to, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
