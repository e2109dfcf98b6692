// SPDX-License-Identifier: Apache-2.0
#include "cuda/ema_scan_launchers.h"
