#pragma once
#include "cpu/support/history.h"
