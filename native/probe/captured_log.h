// Keeps what llama.cpp and its libraries say on stderr, so that an error can be answered in their own words.  They
// say it in three ways (llama_log_set, common_log, fprintf); all of them end in file descriptor 2.
#pragma once

#include <string>
#include <vector>

class CapturedLog {
  public:
    CapturedLog();
    ~CapturedLog();
    CapturedLog(const CapturedLog &) = delete;
    CapturedLog & operator=(const CapturedLog &) = delete;

    void clear();
    std::vector<std::string> lines() const;  // the last ones, without blank lines and timestamps

  private:
    int original_stderr_;
    int captured_;
};

// For a thread that does what another one does as well, and would say the same.
void mute_this_thread();
