# SPDX-License-Identifier: Apache-2.0
# CMAKE_TOOLCHAIN_FILE for Linux on aarch64: CXX names the cross compiler, Debian's has its libraries where qemu looks.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
