// Large reads of a file that is also written, mapped, cut and extended: each must see what was done before it. Linux may serve them past
// its page cache, which must not show. Ends with 0, or says what was wrong.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SIZE = 3 * (1 << 20) + 12345, ROOM = 4 << 20, PAGE = 4096 };

static unsigned char expected[ROOM], room[ROOM + PAGE];
static const char *doing;

static void fail(const char *what) {
  fprintf(stderr, "%s: %s (%s)\n", doing, what, strerror(errno));
  exit(1);
}

static void check(int file, size_t size, off_t from, size_t length, size_t misaligned) {
  size_t have = from >= (off_t)size ? 0 : size - from < length ? size - from : length, got = 0;
  memset(room, 0xee, sizeof room);
  while (got < length) {
    ssize_t more = pread(file, room + misaligned + got, length - got, from + got);
    if (more < 0) fail("pread");
    if (more == 0) break;
    got += more;
  }
  if (got != have) fail("another length than the file has");
  if (memcmp(room + misaligned, expected + from, have)) fail("other bytes than were written");
  if (room[misaligned + have] != 0xee) fail("more was written to memory than was read");
}

static void check_all(int file, size_t size) {
  static const size_t lengths[] = {PAGE, 128 << 10, (128 << 10) + 1, 1 << 20, 3 << 20, ROOM - PAGE};
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
    check(file, size, 0, lengths[i], 0);
    check(file, size, 4097, lengths[i], 0);
    check(file, size, 1 << 20, lengths[i], 1);
    check(file, size, size - 1, lengths[i], 513);
  }
}

static void put(int file, off_t at, const char *text) {
  if (pwrite(file, text, strlen(text), at) != (ssize_t)strlen(text)) fail("pwrite");
  memcpy(expected + at, text, strlen(text));
}

int main(void) {
  int file = open("file", O_RDWR | O_CREAT | O_EXCL, 0600);
  if (file < 0) fail("open");

  doing = "a file that was just written";
  for (size_t i = 0; i < SIZE; i++) expected[i] = i * 2654435761u >> 13;
  if (write(file, expected, SIZE) != SIZE) fail("write");
  check_all(file, SIZE);

  doing = "a file that was opened anew";
  if (close(file) || (file = open("file", O_RDWR)) < 0) fail("open");
  check_all(file, SIZE);

  doing = "a file of which a part was written";
  put(file, 2000000, "in the middle");
  check_all(file, SIZE);

  doing = "a file that was changed in a mapping";
  unsigned char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (map == MAP_FAILED) fail("mmap");
  for (size_t at = 77; at < SIZE; at += 1 << 19) {
    map[at] ^= 0xff;
    expected[at] ^= 0xff;
    check(file, SIZE, 0, 3 << 20, 0);
  }
  check_all(file, SIZE);

  doing = "a mapping of a file that was written";
  put(file, 1500000, "seen by the mapping");
  if (memcmp(map, expected, SIZE)) fail("other bytes than were written");

  doing = "reading a file into a mapping of itself";
  if (pread(file, map, 1 << 20, 2 << 20) != 1 << 20) fail("pread");
  memcpy(expected, expected + (2 << 20), 1 << 20);
  if (munmap(map, SIZE)) fail("munmap");
  check_all(file, SIZE);

  doing = "a file that was cut and extended";
  if (ftruncate(file, 1000001)) fail("ftruncate");
  check_all(file, 1000001);
  if (ftruncate(file, SIZE)) fail("ftruncate");
  memset(expected + 1000001, 0, SIZE - 1000001);
  check_all(file, SIZE);

  doing = "a file that two descriptors append to";
  int other = open("file", O_WRONLY | O_APPEND);
  if (other < 0 || write(other, "the end", 7) != 7) fail("append");
  memcpy(expected + SIZE, "the end", 7);
  check_all(file, SIZE + 7);

  doing = "reading into several pieces of memory";
  struct iovec pieces[] = {{room, 200001}, {room + 300000, 99}, {room + 400000, 500000}};
  if (preadv(file, pieces, 3, 5) != 700100) fail("preadv");
  if (memcmp(room, expected + 5, 200001) || memcmp(room + 300000, expected + 200006, 99) ||
      memcmp(room + 400000, expected + 200105, 500000))
    fail("other bytes than were written");

  doing = "reading into memory that is read-only";
  void *fixed = mmap(NULL, 1 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pread(file, fixed, 1 << 20, 0) != -1 || errno != EFAULT) fail("no EFAULT");
  return 0;
}
