// Do both ways of reading fill exactly what was asked for, and say what they could not?
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "courier.h"
#include "io.h"

namespace {

using fate::Read;
using fate::Reads;

constexpr std::size_t kFileBytes = 3 << 20;

int failures = 0;

void expect(bool holds, const char* what, const std::string& way) {
  if (holds) return;
  std::printf("%s: %s\n", way.c_str(), what);
  ++failures;
}

std::uint8_t byte_at(int file, std::uint64_t offset) {
  return static_cast<std::uint8_t>((offset * 2654435761u >> 7) + 31 * file);
}

int make_file(int number) {
  char name[] = "/tmp/fate-io-XXXXXX";
  const int fd = mkstemp(name);
  std::vector<std::uint8_t> bytes(kFileBytes);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = byte_at(number, i);
  if (fd < 0 || write(fd, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
    std::abort();
  unlink(name);
  return fd;
}

bool filled(const Read& read, int file) {
  for (std::size_t i = 0; i < read.done; ++i)
    if (read.address[i] != byte_at(file, read.offset + i)) return false;
  return true;
}

// Any number of reads of any size, neighbours and strangers, in memory that lies in no order.
void test_random(Reads& reads, const std::string& way, const int* fds, unsigned seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < 20; ++round) {
    const int count = 1 + static_cast<int>(random() % 150);
    std::vector<std::vector<std::uint8_t>> memory(count);
    std::vector<Read> batch;
    std::vector<int> files;
    std::uint64_t offset = 0;
    for (int i = 0; i < count; ++i) {
      const std::size_t length = 1 + random() % (random() % 8 ? 9000 : 300000);
      if (random() % 3 == 0 || offset + length > kFileBytes) offset = random() % (kFileBytes - length);
      files.push_back(static_cast<int>(random() % 8 ? 0 : 1));
      memory[i].assign(length + 1, 0xEE);
      batch.push_back({fds[files[i]], offset, memory[i].data(), length});
      offset += length;
    }
    std::vector<int> order(count);
    reads.read(batch);
    for (int i = 0; i < count; ++i) {
      expect(batch[i].done == batch[i].length && batch[i].error == 0, "a read is not complete", way);
      expect(filled(batch[i], files[i]), "wrong bytes", way);
      expect(memory[i].back() == 0xEE, "written past the end", way);
    }
  }
}

void test_failures(Reads& reads, const std::string& way, int fd) {
  std::vector<std::uint8_t> memory(5 * 4096, 0);
  std::vector<Read> batch{
      {fd, kFileBytes - 4096, &memory[0], 4096}, {fd, kFileBytes, &memory[4096], 4096},
      {fd, kFileBytes - 100, &memory[8192], 4096}, {-1, 0, &memory[12288], 4096},
      {fd, 0, &memory[16384], 4096}, {fd, 0, nullptr, 0}};
  reads.read(batch);
  expect(batch[0].done == 4096 && filled(batch[0], 0), "the last bytes of a file", way);
  expect(batch[1].done == 0 && batch[1].error == 0, "past the end of a file", way);
  expect(batch[2].done == 100 && filled(batch[2], 0), "across the end of a file", way);
  expect(batch[3].done == 0 && batch[3].error == EBADF, "no file", way);
  expect(batch[4].done == 4096 && filled(batch[4], 0), "one beside a failed one", way);
  expect(batch[5].done == 0 && batch[5].error == 0, "nothing to read", way);
}

// Neighbours are read in one go; that one has no memory must not cost the other its bytes.
void test_failed_neighbour(Reads& reads, const std::string& way, int fd) {
  std::vector<std::uint8_t> memory(3 * 4096, 0);
  auto* nowhere = reinterpret_cast<std::uint8_t*>(std::uintptr_t{4096});
  std::vector<Read> batch{{fd, 0, nowhere, 4096}, {fd, 4096, &memory[0], 4096},
                          {fd, 8192, &memory[4096], 4096}};
  reads.read(batch);
  expect(batch[0].done == 0 && batch[0].error == EFAULT, "memory that is not there", way);
  expect(batch[1].done == 4096 && filled(batch[1], 0), "the neighbour of a failed one", way);
  expect(batch[2].done == 4096 && filled(batch[2], 0), "its other neighbour", way);
}

// Every read that is not withdrawn is reported once, with its bytes; one that is, never.
void test_courier(const std::string& way, const int* fds, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::uint8_t> whole(kFileBytes);  // outlives the courier, whose end waits for a read
  fate::Courier courier(Reads::make(way, 16), 16 << 10);
  expect(!courier.wait(0.01) && courier.landed().empty(), "nothing was asked for", way);
  for (int round = 0; round < 30; ++round) {
    const std::size_t count = 1 + random() % 40;
    std::vector<std::vector<std::uint8_t>> memory(count);
    std::vector<std::pair<std::uint64_t, Read>> wanted;
    for (std::size_t id = 0; id < count; ++id) {
      memory[id].resize(1 + random() % 9000);
      const std::uint64_t offset = random() % (kFileBytes - 9000);
      wanted.push_back({id, {fds[id % 2], offset, memory[id].data(), memory[id].size()}});
    }
    wanted[0].second.fd = -1;
    courier.start(wanted);
    std::vector<int> left(count, 1);
    std::size_t open = count;
    for (std::size_t id = 0; id < count; id += 3)
      if (courier.withdraw(id)) {
        left[id] = 0;
        --open;
      }
    expect(!courier.withdraw(count), "a read that nobody asked for", way);
    while (open > 0 && courier.wait(10))
      for (const fate::Courier::Landed& one : courier.landed()) {
        --left[one.id];
        --open;
        const Read& asked = wanted[one.id].second;
        const Read got{asked.fd, asked.offset, asked.address, asked.length, one.done, one.error};
        expect(one.ago_s >= 0, "it landed in the future", way);
        if (one.id == 0)
          expect(got.done == 0 && got.error == EBADF, "a file that is not there", way);
        else
          expect(got.done == got.length && filled(got, one.id % 2), "bytes of the courier", way);
      }
    for (const int one : left) expect(one == 0, "reported once, or withdrawn", way);
  }
  const Read large{fds[0], 0, whole.data(), whole.size()};
  std::vector<std::pair<std::uint64_t, Read>> many;
  for (std::uint64_t id = 0; id < 40; ++id) many.push_back({id, large});
  courier.start(many);
  courier.drain();
  const std::vector<std::uint8_t> before = whole;
  courier.landed();  // what had begun
  expect(!courier.withdraw(39) && !courier.wait(0.01), "what was to be forgotten", way);
  expect(whole == before, "memory is written to after the drain", way);
  courier.start({{7, large}});  // its end waits for this one
}

}  // namespace

int main() {
  const int fds[] = {make_file(0), make_file(1)};
  for (const std::string& way : Reads::ways()) {
    test_courier(way, fds, 3);
    for (const int depth : {1, 4, 64}) {
      const auto reads = Reads::make(way, depth);
      if (!reads) std::abort();
      test_random(*reads, way, fds, 1);
      test_failures(*reads, way, fds[0]);
      test_failed_neighbour(*reads, way, fds[0]);
      std::vector<std::thread> threads;
      for (unsigned i = 0; i < 4; ++i)
        threads.emplace_back([&, i] { test_random(*reads, way, fds, 10 + i); });
      for (std::thread& thread : threads) thread.join();
      std::printf("%s, depth %d\n", way.c_str(), depth);
    }
  }
  if (Reads::make("no such way", 4) || Reads::make("threads", 0)) ++failures;
  std::printf("%d failures\n", failures);
  return failures != 0;
}
